"""Grammars of tool calls for constrained sampling: JSON schemas, and Lark grammars of llguidance."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from oxjax.chat.forms import JsonCalls, NamedCalls, function_of
from oxjax.chat.tool_format import Dialect
from oxjax.errors import ChatTemplateError
from oxjax.tokenizer import Tokenizer

# JSON as Python's `json.dumps` and chat templates write it: whitespace has one form.
_AS_WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def call_schema(
    tools: Iterable[Mapping[str, Any]], name_key: str = "name", arguments_key: str = "arguments"
) -> dict[str, Any]:
    """JSON schema of a call of one of these functions.

    Args:
        tools: descriptions of the functions, in the format of chat templates.
        name_key, arguments_key: keys of a call for the name of the function and its arguments.
    """
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {name_key: {"const": name}, arguments_key: parameters},
                "required": [name_key, arguments_key],
                "additionalProperties": False,
            }
            for name, parameters in _functions(tools)
        ]
    }


def call_grammar(dialect: Dialect, tools: Iterable[Mapping[str, Any]], tokenizer: Tokenizer) -> str:
    """Grammar, in llguidance's Lark, of one call in the format of a dialect, delimiters included.

    Args:
        dialect: one that writes arguments as JSON.
        tools: descriptions of the functions.
        tokenizer: the model's; its control tokens are named by their ids.

    Raises:
        ChatTemplateError: the dialect has another format of calls.
    """
    if dialect.harmony:
        calls = [
            (f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>", parameters, "<|call|>")
            for name, parameters in _functions(tools)
        ]
    else:
        form = next((f for f in reversed(dialect.calls) if isinstance(f, JsonCalls | NamedCalls)), None)
        if form is None:
            raise ChatTemplateError(f"calls of the dialect {dialect.name!r} are not JSON, and have no grammar here")
        if isinstance(form, JsonCalls):
            keys = (form.name_keys[0], form.arguments_keys[0])
            calls = [(form.begin, call_schema(tools, *keys), form.end)]
        else:
            head = "functions.{}:0" if form.head_is_id else "{}"
            calls = [
                (form.begin + head.format(name) + form.separator, parameters, form.end)
                for name, parameters in _functions(tools)
            ]
    control = re.compile("|".join(map(re.escape, sorted(tokenizer.control_texts, key=len, reverse=True))) or "(?!)")

    def literal(text: str) -> list[str]:
        """Terminals of a text: control tokens by id, the rest in quotes."""
        found = map(tokenizer.id_of, control.findall(text))
        # A token that ends the text is no part of it: it follows where the text is complete.
        ids = ["" if token in tokenizer.eog_ids else f"<[{token}]>" for token in found]
        rest = [json.dumps(part, ensure_ascii=False) if part else "" for part in control.split(text)]
        return [t for pair in zip(rest, [*ids, ""], strict=True) for t in pair if t]

    options = [
        " ".join([*literal(a), "%json " + json.dumps({**schema, "x-guidance": _AS_WRITTEN}), *literal(z)])
        for a, schema, z in calls
    ]
    return "start: " + "\n     | ".join(options) + "\n"


def _functions(tools: Iterable[Mapping[str, Any]]) -> list[tuple[str, Any]]:
    found = [(f["name"], f.get("parameters") or {"type": "object"}) for f in map(function_of, tools)]
    # Arguments that a function does not name would be an error of the call.
    return [(name, {"additionalProperties": False, **p} if "properties" in p else p) for name, p in found]
