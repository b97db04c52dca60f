"""Schemas and grammars of calls say what the parser reads."""

import json

import pytest

from oxjax.chat import DIALECTS, call_grammar, call_schema, tool_schema
from oxjax.errors import ChatTemplateError
from tests.chat.test_session import double, tokenizer  # noqa: F401

TOOLS = [tool_schema(double), {"type": "function", "function": {"name": "now"}}]
WRITTEN = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
PARAMETERS = {
    "additionalProperties": False,
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
}


def test_the_schema_of_a_call():
    first, second = call_schema(TOOLS)["anyOf"]
    assert first["properties"] == {"name": {"const": "double"}, "arguments": PARAMETERS}
    assert first["required"] == ["name", "arguments"]
    assert second["properties"] == {"name": {"const": "now"}, "arguments": {"type": "object"}}
    assert call_schema(TOOLS[:1], "tool", "with")["anyOf"][0]["required"] == ["tool", "with"]


def test_the_grammar_of_a_dialect(tokenizer):  # noqa: F811
    begin, end = (f"<[{tokenizer.id_of(t)}]>" for t in ("<tool_call>", "</tool_call>"))
    assert call_grammar(DIALECTS["hermes"], TOOLS, tokenizer) == (
        f"start: {begin} %json {json.dumps({**call_schema(TOOLS), **WRITTEN})} {end}\n"
    )
    assert call_grammar(DIALECTS["mistral"], TOOLS, tokenizer) == (
        f'start: "[TOOL_CALLS]double[ARGS]" %json {json.dumps({**PARAMETERS, **WRITTEN})}\n'
        f'     | "[TOOL_CALLS]now[ARGS]" %json {json.dumps({"type": "object", **WRITTEN})}\n'
    )
    assert '"<|channel|>commentary to=functions.now ' in call_grammar(DIALECTS["gpt-oss"], TOOLS, tokenizer)
    assert '"<|tool_call_begin|>functions.now:0<|' in call_grammar(DIALECTS["kimi-k2"], TOOLS, tokenizer)
    with pytest.raises(ChatTemplateError, match="'glm' are not JSON"):
        call_grammar(DIALECTS["glm"], TOOLS, tokenizer)
