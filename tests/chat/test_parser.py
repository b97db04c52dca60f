"""Taking a message apart while it is written: the same whatever the pieces, and nothing lost where it is no call."""

import json
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oxjax.chat import DIALECTS, ChatParser, Dialect, Message, ToolCall
from oxjax.chat.tool_format import named
from oxjax.errors import ChatTemplateError

CALL = '{"name": "f", "arguments": {"a": 1}}'
F = ("f", {"a": 1})
THINK = named("hermes", "<think>")


def parse(dialect: Dialect | str, text: str, cuts=(), tools=(), **options) -> Message:
    """The message of a text that comes in pieces; what the deltas say is what the message says."""
    parser = ChatParser(DIALECTS[dialect] if isinstance(dialect, str) else dialect, tools, **options)
    places = [0, *sorted(cuts), len(text)]
    deltas = [d for a, b in pairwise(places) for d in parser.feed(text[a:b])]
    deltas += parser.finish()
    message = parser.message
    assert "".join(d.content for d in deltas) == message.content
    assert "".join(d.reasoning for d in deltas) == message.reasoning
    assert [d.tool_call for d in deltas if d.tool_call] == message.tool_calls
    return message


def calls(message: Message) -> list:
    return [(c.name, c.arguments) for c in message.tool_calls]


# One text of every format, as its model writes it, with an answer and reasoning where there is room for them.
INVOKE = '<invoke name="f"><parameter name="a">1</parameter><parameter name="b">x <y></parameter></invoke>'
TEXTS = {
    "hermes": f'Hi <tool_call>\n{CALL}\n</tool_call>\n<tool_call>{{"name": "g"}}</tool_call> bye',
    "gpt-oss": "<|channel|>analysis<|message|>Hmm<|end|><|start|>assistant<|channel|>commentary<|message|>Hi<|end|>"
    '<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": "<|end|>"}<|call|>',
    "llama3": '{"name": "f", "parameters": {"a": "}"}}; {"name": "g", "parameters": {}}',
    "mistral": 'Hi[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": "[TOOL_CALLS]"}[TOOL_CALLS][{"name": "g"}]',
    "gemma4": 'Hi<|tool_call>call:f{a:<|"|>x}"\\<|"|>,b:[1,{c:None}],d:true}<tool_call|>bye',
    "deepseek": "Hi<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
    '<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{"a": "```"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "deepseek-v3.2": "Hi\n\n<｜DSML｜function_calls>\n" + INVOKE.replace("<i", "<｜DSML｜i").replace("<p", "<｜DSML｜p")
    .replace("</", "</｜DSML｜").replace('">1', '" string="false">1') + "\n</｜DSML｜function_calls>",
    "qwen3-coder": "Hi<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n<x>\n\n</parameter>\n"
    "</function>\n<function=g>\n</function>\n</tool_call>bye",
    "glm": "Hi<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>x y</arg_value>\n</tool_call><tool_call>g</tool_call>",
    "minimax-m2": f"Hi\n<minimax:tool_call>\n{INVOKE}\n</minimax:tool_call>",
    "minicpm5": 'Hi<function name="f"><param name="a"><![CDATA[</param>]]></param></function>',
    "kimi-k2": "Hi<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
    '{"a": 1}<|tool_call_end|><|tool_calls_section_end|>',
    "tool_calls": f"Hi<tool_calls>[{CALL}, {CALL}]</tool_calls>",
    "gigachat": f"Hi<|function_call|>{CALL}",
    "cohere2": 'Hi<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "f", "parameters": {"a": 1}}]<|END_ACTION|>',
    "command-r": 'Hi\nAction:\n```json\n[{"tool_name": "f", "parameters": {"a": 1}}]```',
    "lfm2": "Hi<|tool_call_start|>[f(a='it\\'s)', b=[1, True, null]), g()]<|tool_call_end|>",
    "functools": f"Hi functools[{CALL}]",
    "plain": "<tool_call>Hi",
}  # fmt: skip
EXPECTED = {
    "hermes": ("Hi \n bye", [F, ("g", {})]),
    "gpt-oss": ("Hi", [("f", {"a": "<|end|>"})]),
    "llama3": ("", [("f", {"a": "}"}), ("g", {})]),
    "mistral": ("Hi", [("f", {"a": "[TOOL_CALLS]"}), ("g", {})]),
    "gemma4": ("Hibye", [("f", {"a": 'x}"\\', "b": [1, {"c": None}], "d": True})]),
    "deepseek": ("Hi", [("f", {}), ("g", {"a": "```"})]),
    "deepseek-v3.2": ("Hi", [("f", {"a": 1, "b": "x <y>"})]),
    "qwen3-coder": ("Hibye", [("f", {"a": 1, "b": "<x>\n"}), ("g", {})]),
    "glm": ("Hi", [("f", {"a": "x y"}), ("g", {})]),
    "minimax-m2": ("Hi", [("f", {"a": 1, "b": "x <y>"})]),
    "minicpm5": ("Hi", [("f", {"a": "</param>"})]),
    "kimi-k2": ("Hi", [F]),
    "tool_calls": ("Hi", [F, F]),
    "gigachat": ("Hi", [F]),
    "cohere2": ("Hi", [F]),
    "command-r": ("Hi", [F]),
    "lfm2": ("Hi", [("f", {"a": "it's)", "b": [1, True, None]}), ("g", {})]),
    "functools": ("Hi", [F]),
    "plain": ("<tool_call>Hi", []),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_format(dialect):
    message = parse(dialect, TEXTS[dialect])
    assert (message.content, calls(message)) == EXPECTED[dialect]
    assert len({c.id for c in message.tool_calls}) == len(message.tool_calls)
    assert parse(dialect, TEXTS[dialect], range(len(TEXTS[dialect]))) == message


def shuffled(dialect: str, seed: int) -> str:
    """Pieces of a format's text in any order: calls that end too early, begin within another, or not at all."""
    rng = random.Random(seed)
    text = TEXTS[dialect] + "<think>hm</think>"
    places = sorted(rng.sample(range(len(text)), rng.randint(0, 6)))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    if rng.random() < 0.7:
        rng.shuffle(pieces)
    return "".join(pieces) + rng.choice(["", "", " ", TEXTS[dialect], '{"', "[1]"])


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(DIALECTS)), st.integers(0, 10**9), st.data())
def test_the_message_does_not_depend_on_the_pieces(dialect, seed, data):
    text = shuffled(dialect, seed)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    known = named(dialect, "<think>")
    assert parse(known, text, cuts) == parse(known, text) == parse(known, text, range(len(text)))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.lists(st.sampled_from([*'ab"\\{}[]<|,:\né\u2028😀', "</tool_call>", "<tool_call>", "<|call|>"])).map("".join),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
JSON_FORMS = {
    "hermes": lambda c: "".join(f"<tool_call>{json.dumps(x, ensure_ascii=False)}</tool_call>" for x in c),
    "tool_calls": lambda c: f"<tool_calls>\n{json.dumps(c, indent=1)}\n</tool_calls>",
    "mistral": lambda c: "".join(f"[TOOL_CALLS]{x['name']}[ARGS]{json.dumps(x['arguments'])}" for x in c),
    "llama3": lambda c: "<|python_tag|>" + "; ".join(json.dumps(x) for x in c),
    "kimi-k2": lambda c: "".join(
        f"<|tool_call_begin|>functions.{x['name']}:{i}<|tool_call_argument_begin|>{json.dumps(x['arguments'])}"
        "<|tool_call_end|>" for i, x in enumerate(c)
    ),
    "gpt-oss": lambda c: "".join(
        f"<|start|>assistant to=functions.{x['name']}<|channel|>commentary json<|message|>{json.dumps(x['arguments'])}"
        "<|call|>" for x in c
    ),
}  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(JSON_FORMS)),
    st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), min_size=1, max_size=3),
    st.data(),
)
def test_any_arguments_in_any_pieces(form, arguments, data):
    asked = [{"name": f"f{i}", "arguments": a} for i, a in enumerate(arguments)]
    text = JSON_FORMS[form](asked)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    message = parse(form, text, cuts)
    assert calls(message) == [(c["name"], c["arguments"]) for c in asked]
    assert message.content == ""


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call>{'name': 'f'}</tool_call>",
        '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": 1}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 3000 + "1" + "}" * 3001 + "</tool_call>",
        '<tool_call>{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}</tool_call>",
        "<tool_call>[]</tool_call>",
        "<tool_call>[1]</tool_call>",
        "<tool_call>hello</tool_call>",
        '<tool_call>{"name": "f',
        "<tool_c",
    ],
)
def test_what_is_no_call_stays_in_the_answer_and_scanning_goes_on(text):
    message = parse("hermes", text)
    assert (message.content, message.tool_calls) == (text, [])
    message = parse("hermes", f"{text} <tool_call>{CALL}</tool_call>")
    if text.startswith("<tool_call>") and text.count('"') % 2 == 0:
        assert (message.content, calls(message)) == (text, [F])


def test_a_call_may_lack_its_arguments_its_end_and_its_good_form():
    for text in (
        '<tool_call>{"name": "f"}',
        '<tool_call>{"name": "f", "arguments": {}}</tool_cal',
        '<tool_call>[{"name": "f", "parameters": {}}]',
        '<tool_call>{"type": "function", "function": {"name": "f", "arguments": "{}"}}</tool_call>',
    ):
        assert calls(parse("hermes", text)) == [("f", {})]
    assert calls(parse("hermes", f"<tool_call>{CALL}\n{CALL},[{CALL}]</tool_call>")) == [F] * 3
    assert calls(parse("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}')) == [("f", {"a": "x\ny"})]


def test_text_comes_as_soon_as_it_is_certain():
    parser = ChatParser(DIALECTS["hermes"])
    assert [d.content for d in parser.feed("Hello ")] == ["Hello"]
    assert [d.content for d in parser.feed("you<tool")] == [" you"]
    assert [d.content for d in parser.feed("box>\n\n")] == ["<toolbox>"]
    assert parser.feed("<tool_call>" + CALL[:-1]) == []
    assert [d.tool_call for d in parser.feed("}")] == [ToolCall(*F, "call00000")]
    assert parser.feed("</tool_call>\n") == parser.finish() == []
    assert parser.message.content == "Hello you<toolbox>"


@pytest.mark.parametrize(
    "prompt, text, reasoning, content",
    [
        ("", "<think>\nHm <b>\n</think>\n\nHi", "Hm <b>", "Hi"),
        ("<|im_start|>assistant\n<think>\n", "Hm</think>Hi", "Hm", "Hi"),
        ("<think>\n\n</think>\n\n", "Hi", "", "Hi"),
        ("", "<think>Hm", "Hm", ""),
        ("", "</think>Hi", "", "Hi"),
        ("", "<think>a</think><think>b</think>Hi", "ab", "Hi"),
        ("", "Write <think> first", "", "Write <think> first"),
        ("", f"<think><tool_call>{CALL}</tool_call></think>Hi", f"<tool_call>{CALL}</tool_call>", "Hi"),
    ],
)
def test_reasoning(prompt, text, reasoning, content):
    message = parse(THINK, text, range(len(text)), prompt=prompt)
    assert (message.reasoning, message.content, message.tool_calls) == (reasoning, content, [])


def test_channels_of_gpt_oss():
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi!"
    assert parse("gpt-oss", text) == Message("Hi!", "Hm.")
    assert parse("gpt-oss", "Hi!") == Message("Hi!")
    assert parse("gpt-oss", "<|channel|>anal") == Message()
    assert parse("gpt-oss", " to=python<|channel|>analysis code<|message|>print(1)<|call|>").content == "print(1)"
    call = '<|channel|>commentary to=functions.f<|message|>{"a": 1}'
    assert calls(parse("gpt-oss", call)) == [F]
    assert parse("gpt-oss", call[:-1]).content == '{"a": 1'


def test_undelimited_calls_need_arguments_and_the_beginning_of_the_message():
    assert parse("llama3", '{"name": "Bob", "age": 3}').content == '{"name": "Bob", "age": 3}'
    assert parse("llama3", 'So {"name": "f", "parameters": {}}').tool_calls == []
    assert calls(parse("llama3", ' \n{"name": "f", "parameters": {}}')) == [("f", {})]
    assert calls(parse("llama3", '<|python_tag|>search.call(query="a b")')) == [("search", {"query": "a b"})]
    assert parse("llama3", "<|python_tag|>print(1 + 1)").content == "<|python_tag|>print(1 + 1)"


def test_a_dialect_without_calls_still_knows_what_frames_text():
    dialect = DIALECTS["cohere2"].without_calls()
    assert parse(dialect, "<|START_TEXT|>Hi<|END_TEXT|><|START_ACTION|>[]").content == "Hi<|START_ACTION|>[]"


def test_schemas_say_what_untyped_text_is():
    schema = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    text = "<tool_call>f<arg_key>a</arg_key><arg_value>12</arg_value><arg_key>b</arg_key><arg_value>12</arg_value>"
    text += "<arg_key>c</arg_key><arg_value>True</arg_value></tool_call>"
    assert calls(parse("glm", text, tools=tools)) == [("f", {"a": "12", "b": 12, "c": True})]


def test_ids_are_the_models_or_counted():
    both = '[TOOL_CALLS][{"name": "f", "id": "abcdefgh1"}, {"name": "g", "id": "x"}]'
    assert [c.id for c in parse("mistral", both, n_calls=7).tool_calls] == ["abcdefgh1", "call00008"]
    assert [c.id for c in parse("kimi-k2", TEXTS["kimi-k2"]).tool_calls] == ["functions.f:0"]


def test_delimiters_of_ones_own():
    dialect = Dialect.custom("<<", ">>", name_key="tool", arguments_key="with")
    message = parse(dialect, 'a << {"tool": "f", "with": {"x": ">>"}} >> b << c', range(40))
    assert (message.content, calls(message)) == ("a  b << c", [("f", {"x": ">>"})])
    with pytest.raises(ChatTemplateError, match="begin is empty"):
        Dialect.custom("")
    with pytest.raises(ChatTemplateError, match="no dialect 'klingon'"):
        named("klingon", "")


def test_a_message_as_templates_take_it():
    message = Message("Hi", "Hm", [ToolCall("f", {"a": 1}, "x")])
    function = {"name": "f", "arguments": {"a": 1}}
    assert message.as_dict() == {
        "role": "assistant",
        "content": "Hi",
        "reasoning_content": "Hm",
        "tool_calls": [{"id": "x", "type": "function", "function": function}],
    }
    assert Message("Hi").as_dict() == {"role": "assistant", "content": "Hi"}
