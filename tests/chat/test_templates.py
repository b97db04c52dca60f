"""Calls, reasoning and answers as published templates write them are read back as they were."""

import functools
import json
from datetime import datetime

import pytest

from oxjax.chat import ChatParser, Message, detect
from oxjax.errors import ChatTemplateError
from oxjax.tokenizer.chat import ChatTemplate
from tests.helpers.data import DATA

DATE = datetime(2026, 11, 20)
THINKING = {"enable_thinking": True, "thinking": True, "date": DATE}
PARAMETERS = {
    "get_weather": {
        "city": {"type": "string", "description": "Where."},
        "days": {"type": "integer", "description": "How many."},
    },
    "find": {
        "q": {"type": "string", "description": "What."},
        "opts": {"type": "object", "description": "How.", "additionalProperties": True},
        "n": {"type": "string", "description": "Number as text."},
    },
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Does it.",
            "parameters": {
                "type": "object",
                "properties": properties,
                "required": list(properties)[:1],
                "additionalProperties": False,
            },
        },
    }
    for name, properties in PARAMETERS.items()
]
CALLS = [
    ("get_weather", {"city": 'São "P" <b>{[</b>\n\\', "days": 3}),
    ("find", {"q": "a}]<tool> 'x'", "n": "12", "opts": {"deep": [1, {"x": [2.5, "}"]}], "ok": True}}),
]
REASONING, ANSWER = "The user wants\n\nweather.", "Let me see."
USER = {"role": "user", "content": "Hi"}

# What each template is taken for, and what of (several calls, reasoning, an answer) it shows beside a call. Where an
# entry is not True, the template itself drops it, or refuses it.
SHOWN = {
    "Apriel-1.6-15b-Thinker-fixed": ("tool_calls", True, True, True),
    "Bielik-11B-v3.0-Instruct": ("hermes", True, True, True),
    "Cohere2MoE": ("cohere2", True, True, False),
    "CohereForAI-c4ai-command-r-plus-tool_use": ("command-r", True, False, True),
    "GLM-4.6": ("glm", True, True, True),
    "GLM-4.7-Flash": ("glm", True, True, True),
    "GigaChat3.1-10B-A1.8B": ("gigachat", False, False, True),
    "LFM2.5-8B-A1B": ("lfm2", True, False, True),
    "MiniMax-M1": ("tool_calls", True, False, False),
    "MiniMax-M2": ("minimax-m2", True, True, True),
    "Mistral-Small-3.2-24B-Instruct-2506": ("mistral", True, False, False),
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": ("qwen3-coder", True, True, True),
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": ("hermes", True, False, False),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": ("hermes", True, False, False),
    "Qwen-Qwen2.5-7B-Instruct": ("hermes", True, False, True),
    "Qwen-Qwen3-0.6B": ("hermes", True, True, True),
    "Qwen3.5-4B": ("qwen3-coder", True, True, True),
    "Reka-Edge": ("hermes", True, True, True),
    "StepFun3.5-Flash": ("qwen3-coder", True, True, True),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": ("deepseek", True, False, False),
    "deepseek-ai-DeepSeek-V3.1": ("deepseek", True, False, True),
    "deepseek-ai-DeepSeek-V3.2": ("deepseek-v3.2", True, True, True),
    "deepseek-ai-DeepSeek-V4": ("deepseek-v3.2", True, True, True),
    "fireworks-ai-llama-3-firefunction-v2": ("functools", True, False, True),
    "google-gemma-4-31B-it": ("gemma4", True, True, True),
    "google-gemma-4-31B-it-interleaved": ("gemma4", True, True, True),
    "ibm-granite-granite-4.0": ("hermes", True, False, True),
    "ibm-granite-granite-4.1": ("hermes", True, False, True),
    "llama-cpp-deepseek-r1": ("deepseek", True, False, False),
    "meta-llama-Llama-3.1-8B-Instruct": ("llama3", False, False, False),
    "meta-llama-Llama-3.3-70B-Instruct": ("llama3", False, False, False),
    "mistralai-Mistral-Nemo-Instruct-2407": ("mistral", True, False, False),
    "moonshotai-Kimi-K2": ("kimi-k2", True, False, True),
    "openai-gpt-oss-120b": ("gpt-oss", False, True, False),
    "openbmb-MiniCPM5-1B": ("minicpm5", True, True, True),
    "poolside-Laguna-XS-2.1": ("glm", True, True, True),
    "poolside-Laguna-XS.2": ("glm", True, True, True),
    "unsloth-Apriel-1.5": ("tool_calls", True, False, True),
    "unsloth-mistral-Devstral-Small-2507": ("mistral", True, False, True),
}
# Templates that show no calls of an assistant, so that there is nothing to read back.
NO_CALLS = {"HuggingFaceTB-SmolLM3-3B", "LFM2.5-Instruct", "llama-cpp-rwkv-world", "microsoft-Phi-3.5-mini-instruct"}
# Templates whose calls are in a format that oxjax does not read.
UNSUPPORTED = {"Kimi-K3", "meetkai-functionary-medium-v3.2"}
# Templates that the sandbox refuses once there are calls, as Hugging Face's does: they change a list.
REFUSED = {"Kimi-K2-Thinking"}

# What some templates need besides.
VARIABLES = {
    "fireworks-ai-llama-3-firefunction-v2": {"functions": "", "datetime": "Nov 20 2026"},
    "llama-cpp-deepseek-r1": {"tools": None},  # it cannot list tools: see test_chat_templates.py
}
# These write strings into Python literals without escapes; nobody could read quotes back.
UNESCAPED = {"LFM2.5-8B-A1B"}
# These take arguments as JSON text only, and show calls only where there is no answer at all.
TEXT_ARGUMENTS, NO_CONTENT = {"deepseek-ai-DeepSeek-R1-Distill-Llama-8B"}, {"deepseek-ai-DeepSeek-R1-Distill-Llama-8B"}
# These put more after a message than the end of its turn: here is what is around the message.
AROUND = {
    "CohereForAI-c4ai-command-r-plus-tool_use": ("<|CHATBOT_TOKEN|>", "<|START_OF_TURN_TOKEN|>"),
    "fireworks-ai-llama-3-firefunction-v2": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
}
# What ends a turn. Generation stops there, and the token's text is not part of the message.
ENDS = (
    "<|im_end|>", "</s>", "<|eot_id|>", "<|call|>", "<|return|>", "<|end|>", "<|tool_response>", "<turn|>", "[e~[",
    "<|END_OF_TURN_TOKEN|>", "<|message_sep|>", "<end_of_sentence>", "<sep>", "<|end_of_text|>", "</assistant>",
    "<｜end▁of▁sentence｜>",
)  # fmt: skip


@functools.cache
def published(name: str) -> ChatTemplate:
    source = (DATA / "templates" / f"{name}.jinja").read_text("utf-8")
    return ChatTemplate(source, bos_token="", eos_token="</s>", name=name)


def written(name: str, message: dict) -> tuple[str, str]:
    """What a template puts before an assistant's message, and the message itself, without the end of its turn."""
    template, dialect = published(name), detect(published(name).source)
    given = {"date": DATE, "tools": TOOLS, "enable_thinking": True, "thinking": True} | VARIABLES.get(name, {})
    prompt = template.render([USER], **given)
    # Templates that close the reasoning at once, or show none of it, write less before the message than the prompt.
    short = [prompt.rstrip().removesuffix(begin) for begin, _ in dialect.reasoning]
    off = template.render([USER], **given | {"enable_thinking": False, "thinking": False})
    whole = template.render([USER, message], **given, add_generation_prompt=False)
    if name in AROUND:
        before, text = whole.split(AROUND[name][0])[:2]
        return before, text.split(AROUND[name][1])[0].removesuffix("<|END_OF_TURN_TOKEN|>")
    before = next(p for p in (prompt, off, *short, *(s.rstrip() for s in short)) if whole.startswith(p))
    text = whole[len(before) :].rstrip()
    while end := next((e for e in ENDS if text.endswith(e)), None):
        text = text.removesuffix(end).rstrip()
    # Apriel's history leaves out what the prompt for a new message opens.
    opened = any(end in text and begin not in text for begin, end in dialect.reasoning)
    return (prompt if opened else before), text


def read(name: str, before: str, text: str) -> Message:
    parser = ChatParser(detect(published(name).source), TOOLS, prompt=before)
    parser.feed(text)
    parser.finish()
    return parser.message


@pytest.mark.parametrize("name", SHOWN)
def test_what_a_template_writes_is_read_back(data, name):
    dialect, several, shows_reasoning, shows_answer = SHOWN[name]
    assert detect(published(name).source).name == dialect
    calls = CALLS if several else CALLS[:1]
    if name in UNESCAPED:
        calls = [(n, {k: "a{[" if isinstance(v, str) else v for k, v in a.items()}) for n, a in calls]
    message = {
        "role": "assistant",
        "content": None if name in NO_CONTENT else ANSWER if shows_answer else "",
        "tool_calls": [
            {
                "id": f"call{i:05d}",
                "type": "function",
                "function": {"name": n, "arguments": json.dumps(a) if name in TEXT_ARGUMENTS else a},
            }
            for i, (n, a) in enumerate(calls)
        ],
    }
    if shows_reasoning:
        message["thinking" if dialect == "gpt-oss" else "reasoning_content"] = REASONING
    found = read(name, *written(name, message))
    assert [(c.name, c.arguments) for c in found.tool_calls] == calls
    assert len({c.id for c in found.tool_calls}) == len(calls)
    assert found.reasoning == (REASONING if shows_reasoning else "")
    assert found.content == (ANSWER if shows_answer else "")


@pytest.mark.parametrize("name", SHOWN)
def test_an_answer_without_calls_is_read_back(data, name):
    found = read(name, *written(name, {"role": "assistant", "content": "Hello {you}!\n\n[1] see"}))
    assert (found.content, found.reasoning, found.tool_calls) == ("Hello {you}!\n\n[1] see", "", [])


def test_every_published_template_is_accounted_for(data):
    files = {f.stem for f in (data / "templates").glob("*.jinja")}
    assert files == SHOWN.keys() | NO_CALLS | UNSUPPORTED | REFUSED
    for name in UNSUPPORTED | NO_CALLS:
        assert not detect(published(name).source).has_calls
    for name in REFUSED:
        call = {"id": "a", "type": "function", "function": {"name": "find", "arguments": {}}}
        with pytest.raises(ChatTemplateError, match="access to attribute 'append'"):
            published(name).render([USER, {"role": "assistant", "content": "", "tool_calls": [call]}], tools=TOOLS)
