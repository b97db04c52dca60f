"""Forms of tool calls: JSON, a name before JSON, tags, Gemma's notation, Python's.

A form has `begin`, the text before a call (empty: a message may begin with a call), `end`, the text that may close it,
and `repeats`: more calls may come before `end`. `read` reads one call, or an array of them, or raises
`Malformed`; `types` are the parameters' JSON schemas by function.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from oxjax.chat.cursor import Cursor, Malformed, Reader, parse_json

Types = Mapping[str, Mapping[str, Any]]  # function -> parameter -> JSON schema

_ID = re.compile(r"[A-Za-z0-9]{9}")  # what Mistral's templates accept; other formats write no ids of use


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Function object of a tool description; the description may be that object itself."""
    return tool.get("function", tool)


@dataclass(frozen=True)
class ToolCall:
    """Call of a function by the model.

    Attributes:
        name: of the function.
        arguments: by parameter.
        id: unique in a conversation; the message of the result refers to it.
    """

    name: str
    arguments: dict[str, Any]
    id: str = ""


@dataclass(frozen=True)
class JsonCalls:
    """`{"name": ..., "arguments": {...}}`, or an array of these.

    `parameters` is `arguments` by another name, and a call without either has none. Without a `begin`, a JSON answer
    could be taken for a call, so there the arguments have to be there.
    """

    begin: str
    end: str = ""
    name_keys: tuple[str, ...] = ("name", "tool_name")
    arguments_keys: tuple[str, ...] = ("arguments", "parameters")
    repeats: ClassVar[bool] = True

    def read(self, cursor: Cursor, types: Types) -> Reader[list[ToolCall]]:
        """Read an object, or an array of them."""
        value = yield from cursor.json()
        values = value if isinstance(value, list) else [value]
        if not values:
            raise Malformed
        return [self._call(v) for v in values]

    def _call(self, value: Any) -> ToolCall:
        if isinstance(value, dict) and isinstance(value.get("function"), dict):  # as in the OpenAI API
            value = {"id": value.get("id"), **value["function"]}
        if not isinstance(value, dict):
            raise Malformed
        name = next((value[k] for k in self.name_keys if k in value), None)
        arguments = next((value[k] for k in self.arguments_keys if k in value), {} if self.begin else None)
        if isinstance(arguments, str):
            arguments = parse_json(arguments)
        if not isinstance(name, str) or not name or not isinstance(arguments, dict):
            raise Malformed
        call_id = value.get("id")
        return ToolCall(name, arguments, call_id if isinstance(call_id, str) and _ID.fullmatch(call_id) else "")


@dataclass(frozen=True)
class NamedCalls:
    """A name, a separator, and the arguments in JSON.

    Attributes:
        id_mark: text before an id after the name.
        head_is_id: the name is part of an id `functions.<name>:<n>`.
    """

    begin: str
    separator: str
    end: str = ""
    id_mark: str = ""
    head_is_id: bool = False
    repeats: ClassVar[bool] = False

    def read(self, cursor: Cursor, types: Types) -> Reader[list[ToolCall]]:
        """Read one call."""
        yield from cursor.skip_space()
        name, call_id = (yield from cursor.name()), ""
        if self.id_mark and (yield from cursor.take(self.id_mark)):
            call_id = yield from cursor.name()
        if self.head_is_id:
            name, call_id = name.removeprefix("functions.").rpartition(":")[0], name
        yield from cursor.expect(self.separator)
        arguments = yield from cursor.json()
        if not name or not isinstance(arguments, dict):
            raise Malformed
        return [ToolCall(name, arguments, call_id)]


@dataclass(frozen=True)
class TaggedCalls:
    """A name and one pair of tags per argument, whose values are strings as they are and JSON for the rest.

    Attributes:
        open, name_end: delimiters of the name.
        key: text before a parameter's name.
        key_ends: texts that may end it, with True if the value is then a string; None if only the schema tells.
        value: text before a value, after `key_end`.
        value_end: text after it.
        close: text after the call.
        own_lines: values are on lines of their own.
        quote: optional delimiter of a value that is a string.
    """

    begin: str
    open: str
    name_end: str
    key: str
    key_ends: tuple[tuple[str, bool | None], ...]
    value_end: str
    close: str
    value: str = ""
    end: str = ""
    own_lines: bool = False
    quote: tuple[str, str] = ("", "")

    @property
    def repeats(self) -> bool:
        """True if a call has an opening text after `begin`, so that a next call can be told from text."""
        return bool(self.open)

    def read(self, cursor: Cursor, types: Types) -> Reader[list[ToolCall]]:
        """Read one call."""
        yield from cursor.skip_space()
        yield from cursor.expect(self.open)
        name = yield from cursor.name()
        yield from cursor.expect(self.name_end)
        arguments: dict[str, Any] = {}
        while True:
            yield from cursor.skip_space()
            found = yield from cursor.take(self.key, self.close)
            if found is None:
                raise Malformed
            if found == self.close:
                return [ToolCall(name, arguments)]
            key, key_end = yield from cursor.until(*(end for end, _ in self.key_ends))
            if self.value:
                yield from cursor.skip_space()
                yield from cursor.expect(self.value)
            if self.quote[0] and (yield from cursor.take(self.quote[0])):
                arguments[key.strip()], _ = yield from cursor.until(self.quote[1] + self.value_end)
                continue
            text, _ = yield from cursor.until(self.value_end)
            if self.own_lines:
                text = text.removeprefix("\n").removesuffix("\n")
            schema = types.get(name, {}).get(key)
            arguments[key.strip()] = _value(text, dict(self.key_ends)[key_end], schema)


def _value(text: str, is_string: bool | None, schema: Any) -> Any:
    """Value of an argument that is written as text."""
    if is_string or (is_string is None and _only_string(schema)):
        return text
    for read in (lambda t: parse_json(f"[{t}]")[0], lambda t: _literal(ast.parse(t.strip(), mode="eval").body)):
        try:
            return read(text)
        except (Malformed, ValueError, SyntaxError, RecursionError, MemoryError, IndexError):
            continue
    return text


def _only_string(schema: Any) -> bool:
    return isinstance(schema, Mapping) and schema.get("type") in ("string", ["string"])


@dataclass(frozen=True)
class GemmaCalls:
    """`call:name{key:<|"|>text<|"|>,other:[1,{x:true}]}`."""

    begin: str
    end: str
    quote: str
    repeats: ClassVar[bool] = False
    _WORD: ClassVar[re.Pattern[str]] = re.compile(r"([^\s{}\[\],:]+)(\s*:)?")

    def read(self, cursor: Cursor, types: Types) -> Reader[list[ToolCall]]:
        """Read one call."""
        yield from cursor.skip_space()
        yield from cursor.expect("call:")
        name = yield from cursor.name()
        body = yield from cursor.balanced((self.quote,), escape="")
        parts = body.split(self.quote)
        parts = [json.dumps(part) if i % 2 else self._WORD.sub(self._json, part) for i, part in enumerate(parts)]
        arguments = parse_json("".join(parts))
        if not isinstance(arguments, dict):
            raise Malformed
        return [ToolCall(name, arguments)]

    @staticmethod
    def _json(match: re.Match[str]) -> str:
        word, colon = match.group(1), match.group(2) or ""
        if colon:
            return json.dumps(word) + colon
        return "null" if word == "None" else word


@dataclass(frozen=True)
class PythonCalls:
    """`[name(key="text", other=[1, True]), ...]`, or one call without the brackets."""

    begin: str
    end: str = ""
    repeats: ClassVar[bool] = False

    def read(self, cursor: Cursor, types: Types) -> Reader[list[ToolCall]]:
        """Read one call, or a list of them."""
        yield from cursor.skip_space()
        if (yield from cursor.take("[")):
            cursor.at -= 1
            text = ""
        else:
            text = yield from cursor.name()
        text += yield from cursor.balanced(('"', "'"))
        try:
            body = ast.parse(text, mode="eval").body
            calls = [self._call(node) for node in (body.elts if isinstance(body, ast.List) else [body])]
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise Malformed from error
        if not calls:
            raise Malformed
        return calls

    @staticmethod
    def _call(node: ast.expr) -> ToolCall:
        if not isinstance(node, ast.Call) or node.args:
            raise Malformed
        # Llama 3 writes its built-in tools as `brave_search.call(query="...")`.
        name = ast.unparse(node.func).removesuffix(".call")
        arguments = {k.arg: _literal(k.value) for k in node.keywords if k.arg is not None}
        return ToolCall(name, parse_json(json.dumps(arguments)))


def _literal(node: ast.expr) -> Any:
    """Value of a Python literal; JSON's names of constants are allowed.

    Raises:
        ValueError: it is not a literal.
    """
    constants = {"true": True, "false": False, "null": None}
    match node:
        case ast.Name(id=name) if name in constants:
            return constants[name]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values) if None not in keys:  # None stands for `**`
            return {str(_literal(k)): _literal(v) for k, v in zip(keys, values, strict=True) if k is not None}
    value = ast.literal_eval(node)
    if not isinstance(value, (str, int, float, bool, type(None))):
        raise ValueError(f"{type(value).__name__} is not a value of JSON")
    return value
