"""Calls, reasoning and answers as published templates write them are read back as they were."""

import functools
import os
from datetime import datetime

import pytest
from conftest import DATA, data_files

from oxjax.chat import ChatParser, detect
from oxjax.errors import ChatTemplateError
from oxjax.tokenizer.chat import ChatTemplate

DATE = datetime(2026, 11, 20)
THINKING = {"enable_thinking": True, "thinking": True, "date": DATE}
PARAMETERS = {
    "get_weather": {
        "city": {"type": "string", "description": "Where."},
        "days": {"type": "integer", "description": "How many."},
    },
    "find": {
        "q": {"type": "string", "description": "What."},
        "opts": {"type": "object", "description": "How."},
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
REASONING = "The user wants\n\nweather."
USER = {"role": "user", "content": "Hi"}

# Variables that two templates need.
EXTRA = {"fireworks-ai-llama-3-firefunction-v2": {"functions": "", "datetime": "Nov 20 2026"}}
# Templates that show no calls of an assistant, so that there is nothing to read back.
NO_CALLS = {
    "HuggingFaceTB-SmolLM3-3B",
    "LFM2.5-Instruct",
    "llama-cpp-rwkv-world",
    "microsoft-Phi-3.5-mini-instruct",
}
# Templates whose calls are in a format that oxjax does not read.
UNSUPPORTED = {"Kimi-K3", "meetkai-functionary-medium-v3.2"}
# Templates that cannot be rendered with calls at all.
FAILS = {
    "Kimi-K2-Thinking": "access to attribute 'append'",  # the sandbox lets no template change a list
    "llama-cpp-deepseek-r1": "generator is not JSON serializable",
}
# Templates that take, or keep, the first call only.
ONE_CALL = {
    "GigaChat3.1-10B-A1.8B", "meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.3-70B-Instruct",
    "openai-gpt-oss-120b",
}  # fmt: skip
