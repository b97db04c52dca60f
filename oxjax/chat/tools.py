"""Python functions as tools: their schemas, and running the calls of a model."""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oxjax.chat.forms import ToolCall
from oxjax.errors import ToolError

_SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_NAME = re.compile(r"[A-Za-z_][\w-]*")
_SECTION = re.compile(r"(?m)^(Args|Arguments|Parameters|Returns|Raises|Yields|Examples?|Notes?):[ \t]*$")
_ARGUMENT = re.compile(r"(\w+)\s*(?:\([^)]*\))?:\s*(.*)")


def tool_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """Describe a function for chat templates, from its signature and its docstring.

    Types of parameters may be `str`, `int`, `float`, `bool`, `None`, `Any`, `Literal`, lists, dicts with text keys, and
    unions of these. The docstring's text up to its first section describes the function, and lines `name: text` of its
    section `Args` describe parameters. As in transformers, a parameter that may be None is "nullable".

    Args:
        function: with a type hint on every parameter.

    Raises:
        ToolError: it has no usable name, or a parameter whose type is missing or has no JSON schema.
    """
    name = getattr(function, "__name__", "")
    if not _NAME.fullmatch(name):
        raise ToolError(f"{function!r} has no name that a model can call it by: give a function made with def")
    if inspect.iscoroutinefunction(function):
        raise ToolError(f"{name} is asynchronous; give a function that returns its result")
    try:
        hints = typing.get_type_hints(function)
        parameters = inspect.signature(function).parameters
    except (NameError, TypeError, ValueError) as error:
        raise ToolError(f"{name}: its signature cannot be read: {error}") from error
    description, described = _docstring(inspect.getdoc(function) or "")
    properties, required = {}, []
    for key, parameter in parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ToolError(f"{name}: {parameter} cannot be given by name")
        if key not in hints:
            raise ToolError(f"{name}: parameter {key} has no type")
        properties[key] = _schema(hints[key], f"{name}: parameter {key}")
        if key in described:
            properties[key]["description"] = described[key]
        if parameter.default is parameter.empty:
            required.append(key)
    schema = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """Descriptions of a function and of its parameters, from its docstring."""
    summary, *sections = _SECTION.split(text)
    described: dict[str, str] = {}
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        if title in ("Args", "Arguments", "Parameters"):
            last, lines = "", inspect.cleandoc(body).splitlines()
            for line in lines:
                match = _ARGUMENT.fullmatch(line)
                if match:
                    last = match.group(1)
                    described[last] = match.group(2)
                elif last and line.strip():
                    described[last] += " " + line.strip()
    return " ".join(summary.split()), described


def _schema(hint: Any, where: str) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SCALARS:
        return {"type": _SCALARS[hint]}
    if hint is Any:
        return {}
    if origin in (typing.Union, types.UnionType):
        options = [_schema(a, where) for a in arguments if a is not type(None)]
        plain = all(option.keys() == {"type"} for option in options)
        schema = (
            options[0]
            if len(options) == 1
            else ({"type": [option["type"] for option in options]} if plain else {"anyOf": options})
        )
        return schema | ({"nullable": True} if type(None) in arguments else {})
    if origin is typing.Literal and all(type(a) in _SCALARS and a is not None for a in arguments):
        kinds = list(dict.fromkeys(_SCALARS[type(a)] for a in arguments))
        return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(arguments)}
    if hint in (list, Sequence) or origin in (list, Sequence):
        return {"type": "array"} | ({"items": _schema(arguments[0], where)} if arguments else {})
    if hint in (dict, Mapping) or (origin in (dict, Mapping) and arguments[0] is str):
        return {"type": "object"} | ({"additionalProperties": _schema(arguments[1], where)} if arguments else {})
    raise ToolError(f"{where} has the type {hint}, which cannot be written in JSON")


def _wrong(value: Any, schema: Mapping[str, Any], where: str) -> str | None:
    """Error of a value against a schema made by `_schema`; None if it is valid."""
    if value is None and schema.get("nullable"):
        return None
    if "anyOf" in schema:
        problems = [_wrong(value, option, where) for option in schema["anyOf"]]
        return None if None in problems else problems[0]
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        return f"{where}: found {json.dumps(value, ensure_ascii=False)[:80]}; expected {' or '.join(kinds)}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where}: found {value!r}; expected one of {schema['enum']}"
    inner: list[tuple[str, Any, Any]] = []
    if isinstance(value, list) and "items" in schema:
        inner = [(f"{where}[{i}]", v, schema["items"]) for i, v in enumerate(value)]
    if isinstance(value, dict) and "additionalProperties" in schema:
        inner = [(f"{where}.{k}", v, schema["additionalProperties"]) for k, v in value.items()]
    return next((problem for at, v, s in inner if (problem := _wrong(v, s, at))), None)


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    kinds = {"string": str, "integer": int, "number": (int, float), "array": list, "object": dict, "null": type(None)}
    return kind in kinds and isinstance(value, kinds[kind])


@dataclass(frozen=True)
class ToolResult:
    """Result of a tool call.

    Attributes:
        call: the call.
        content: the result, text as it is and anything else as JSON; or the error message.
        is_error: the call failed.
    """

    call: ToolCall
    content: str
    is_error: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Message with the result for the model."""
        return {"role": "tool", "tool_call_id": self.call.id, "name": self.call.name, "content": self.content}


class ToolDispatcher:
    """Runs the functions that a model calls. Immutable, so threads may share it.

    Args:
        functions: by their `__name__`; see `tool_schema`.

    Attributes:
        schemas: their descriptions, by name.

    Raises:
        ToolError: a function cannot be a tool, or two have the same name.
    """

    def __init__(self, functions: Iterable[Callable[..., Any]]):
        self._functions: dict[str, Callable[..., Any]] = {}
        self.schemas: dict[str, dict[str, Any]] = {}
        for function in functions:
            schema = tool_schema(function)
            name = schema["function"]["name"]
            if name in self._functions:
                raise ToolError(f"there are two tools called {name}")
            self._functions[name], self.schemas[name] = function, schema

    def invoke(self, call: ToolCall) -> ToolResult:
        """Run a call. Any error, an exception of the function included, becomes a result with its message."""
        problem = self._problem(call)
        if problem is None:
            try:
                result = self._functions[call.name](**call.arguments)
                text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, allow_nan=False)
                return ToolResult(call, text.encode("utf-8", "replace").decode())
            except Exception as error:  # a function can raise anything, and the model can react to it
                problem = f"{type(error).__name__}: {error}"
        text = json.dumps({"error": problem}, ensure_ascii=False)
        return ToolResult(call, text.encode("utf-8", "replace").decode(), is_error=True)

    def _problem(self, call: ToolCall) -> str | None:
        if call.name not in self._functions:
            return f"there is no tool {call.name!r}; there are {', '.join(self._functions) or 'none'}"
        parameters = self.schemas[call.name]["function"]["parameters"]
        known, required = parameters["properties"], parameters["required"]
        if unknown := [k for k in call.arguments if k not in known]:
            return f"{call.name} has no parameter {unknown[0]!r}; it has {', '.join(known) or 'none'}"
        if missing := [k for k in required if k not in call.arguments]:
            return f"{call.name}: {missing[0]} is missing"
        return next((p for k, v in call.arguments.items() if (p := _wrong(v, known[k], k))), None)
