"""Python functions as tools: their descriptions, and calls that end well or badly but never break anything."""

import functools
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pytest

from oxjax.chat import ToolCall, ToolDispatcher, tool_schema
from oxjax.errors import ToolError


def weather(city: str, days: int = 1, unit: Literal["C", "F"] = "C") -> dict:
    """Forecast the weather.

    It asks nobody.

    Args:
        city: where, in any
            language.
        days (int): how many.

    Returns:
        the forecast.
    """
    return {"city": city, "days": days, "unit": unit}


def test_a_schema_comes_from_signature_and_docstring():
    assert tool_schema(weather) == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Forecast the weather. It asks nobody.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "where, in any language."},
                    "days": {"type": "integer", "description": "how many."},
                    "unit": {"type": "string", "enum": ["C", "F"]},
                },
                "required": ["city"],
            },
        },
    }


def test_types_of_parameters():
    def f(
        a: float, b: bool, c: list[int], d: dict[str, list[str]], e: str | None, g: int | str, h: Any, i: list,
        j: dict, k: list[int] | None, m: int | list[str], n: Literal[1, "x"],
    ): ...  # fmt: skip

    properties = tool_schema(f)["function"]["parameters"]["properties"]
    assert properties == {
        "a": {"type": "number"},
        "b": {"type": "boolean"},
        "c": {"type": "array", "items": {"type": "integer"}},
        "d": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "string"}}},
        "e": {"type": "string", "nullable": True},
        "g": {"type": ["integer", "string"]},
        "h": {},
        "i": {"type": "array"},
        "j": {"type": "object"},
        "k": {"type": "array", "items": {"type": "integer"}, "nullable": True},
        "m": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "string"}}]},
        "n": {"type": ["integer", "string"], "enum": [1, "x"]},
    }


def untyped(a): ...
def positional(a: int, /): ...
def many(*a: int): ...
def keywords(**a: int): ...
def odd(a: set[int]): ...
def pair(a: tuple[int, int]): ...
def by_number(a: dict[int, str]): ...
def unknown(a: "Nowhere"): ...
async def later(a: int): ...


@pytest.mark.parametrize(
    "function, message",
    [
        (untyped, "untyped: parameter a has no type"),
        (positional, "cannot be given by name"),
        (many, "cannot be given by name"),
        (keywords, "cannot be given by name"),
        (odd, r"parameter a has the type set\[int\]"),
        (pair, "cannot be written in JSON"),
        (by_number, "cannot be written in JSON"),
        (unknown, "Nowhere"),
        (later, "asynchronous"),
        (lambda a: a, "no name"),
        (functools.partial(weather, "Paris"), "no name"),
    ],
)
def test_what_cannot_be_a_tool_says_why(function, message):
    with pytest.raises(ToolError, match=message):
        tool_schema(function)


def test_two_tools_of_one_name():
    with pytest.raises(ToolError, match="two tools called weather"):
        ToolDispatcher([weather, weather])


def broken(kind: str) -> Any:
    """Raise, or return what cannot be written."""
    if kind == "raise":
        raise KeyError("nothing")
    return {"object": object(), "nan": float("nan"), "surrogate": "\ud800", "text": "é\n", "none": None}[kind]


def total(numbers: list[int], scale: float | None = None) -> float:
    return sum(numbers) * (1 if scale is None else scale)


@pytest.mark.parametrize(
    "name, arguments, content",
    [
        ("weather", {"city": "Paris"}, '{"city": "Paris", "days": 1, "unit": "C"}'),
        ("total", {"numbers": [1, 2], "scale": 2}, "6"),
        ("total", {"numbers": [], "scale": None}, "0"),
        ("broken", {"kind": "text"}, "é\n"),
        ("broken", {"kind": "none"}, "null"),
        ("broken", {"kind": "surrogate"}, "?"),
    ],
)
def test_results(name, arguments, content):
    result = ToolDispatcher([weather, broken, total]).invoke(ToolCall(name, arguments, "call00003"))
    assert (result.content, result.is_error) == (content, False)
    assert result.as_dict() == {"role": "tool", "tool_call_id": "call00003", "name": name, "content": content}


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("clock", {}, "there is no tool 'clock'; there are weather, broken, total"),
        ("weather", {}, "weather: city is missing"),
        ("weather", {"city": "x", "when": 1}, "weather has no parameter 'when'; it has city, days, unit"),
        ("weather", {"city": 3}, "city: found 3; expected string"),
        ("weather", {"city": "x", "days": True}, "days: found true; expected integer"),
        ("weather", {"city": "x", "unit": "K"}, "unit: found 'K'; expected one of ['C', 'F']"),
        ("total", {"numbers": [1, "2"]}, 'numbers[1]: found "2"; expected integer'),
        ("broken", {"kind": "raise"}, "KeyError: 'nothing'"),
        ("broken", {"kind": "object"}, "TypeError: Object of type object is not JSON serializable"),
        ("broken", {"kind": "nan"}, "ValueError: Out of range float values are not JSON compliant"),
    ],
)
def test_whatever_goes_wrong_is_a_result_that_says_so(name, arguments, message):
    result = ToolDispatcher([weather, broken, total]).invoke(ToolCall(name, arguments))
    assert result.is_error
    assert json.loads(result.content)["error"].startswith(message)


def test_threads_share_a_dispatcher():
    dispatcher = ToolDispatcher([total])
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda n: dispatcher.invoke(ToolCall("total", {"numbers": [n, 1]})).content, range(200))
    assert [int(r) for r in results] == [n + 1 for n in range(200)]
