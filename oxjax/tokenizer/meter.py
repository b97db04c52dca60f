"""Limits on time and memory of one render of an untrusted template, checked before each operation.

Three invariants bound a render, whatever the template says:

1. Every value a template makes weighs at most `Meter.value_limit` and nests at most `MAX_DEPTH` deep. A weight
   counts a value as the tree that `str`, `==` or `hash` would walk, so shared sub-lists cannot blow up. What
   could make a big value in one call (`*`, `**`, `%`, `center`, `replace`, `join` ...) is refused beforehand.
2. All values made in one render weigh at most `Meter.total_left` together.
3. Every loop turn, macro, call, filter, test, operator, comparison and look-up reads the thread's CPU clock.
   By 1 each is short, so `Meter.deadline` stops any render soon after it passes; a busy machine stops none.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, ItemsView, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from typing import Any

from oxjax.errors import ChatTemplateError

CPU_SECONDS = 1.0  # and 2 µs for each unit of weight of the conversation
VALUE_UNITS = 1 << 20  # and 8 times the conversation
TOTAL_UNITS = 1 << 25  # and 1,024 times the conversation: prompts that grow message by message are quadratic
MAX_DEPTH = 100
INT_BITS = 1 << 16
CONTAINERS = (list, tuple, dict, set, frozenset, KeysView, ValuesView, ItemsView)


class Meter:
    """Remaining budget of one render.

    Args:
        inputs: the variables given to the template; they are weighed, and the limits grow with them.
    """

    def __init__(self, inputs: Mapping[str, Any]):
        self.known: dict[int, tuple[object, int, int]] = {}  # id -> (the value, kept alive; weight; depth)
        self.value_limit = 1 << 62
        weight, _ = self.weigh(dict(inputs))
        self.value_limit = VALUE_UNITS + 8 * weight
        self.total_left = TOTAL_UNITS + 1024 * weight
        self.deadline = time.thread_time() + CPU_SECONDS + 2e-6 * weight

    def tick(self) -> None:
        """Count one operation."""
        if time.thread_time() > self.deadline:
            raise ChatTemplateError("the template runs too long: it loops over far more than the conversation")

    def weigh(self, value: Any) -> tuple[int, int]:
        """(weight, depth): characters of strings plus 8 for every element of every container, shared or not."""
        if isinstance(value, str):
            return len(value), 0
        if isinstance(value, int) and value.bit_length() > INT_BITS:
            self.check(value.bit_length(), INT_BITS)
        if id(value) in self.known:
            return self.known[id(value)][1:]
        if not isinstance(value, CONTAINERS):
            return 8, 0
        weight, depth = 8, 0
        children = itertools.chain(value, value.values()) if isinstance(value, dict) else value
        for child in children:
            child_weight, child_depth = self.weigh(child)
            weight, depth = weight + 8 + child_weight, max(depth, child_depth + 1)
            self.check(weight)
        self.know(value, weight, depth)
        return weight, depth

    def know(self, value: object, weight: int, depth: int) -> None:
        """Remember what a container or lazy sequence weighs, if it may nest that deep."""
        if depth > MAX_DEPTH:
            raise ChatTemplateError(f"the template nests a value deeper than {MAX_DEPTH}")
        self.known[id(value)] = (value, weight, depth)

    def check(self, weight: int, limit: int | None = None) -> None:
        """Refuse a value that is too heavy or too deep."""
        limit = self.value_limit if limit is None else limit
        if weight > limit:
            raise ChatTemplateError(f"the template makes a value of size {weight}, the limit is {limit}")

    def made(self, value: Any) -> Any:
        """Account for a value that the template made (or passed on), and return it."""
        if id(value) not in self.known:
            weight, _ = self.weigh(value)
            self.check(weight)
            self.total_left -= weight
            if self.total_left < 0:
                raise ChatTemplateError("the template makes too much text in total")
        return value


METER: ContextVar[Meter] = ContextVar("METER")


def padding(text: str) -> int:
    """The sum of all numbers in a format: an upper bound on the padding it asks for."""
    return sum(int(n[:18]) for n in re.findall(r"\d+", text))


def _guard_width(text: Any, width: int = 80, *_: Any) -> None:
    METER.get().check(width)


def _guard_replace(text: Any, old: Any, new: Any, *_: Any, **__: Any) -> None:
    text = str(text)
    METER.get().check(len(text) + text.count(str(old)) * len(str(new)))


def _guard_reverse_search(text: str, needle: str | None = None, *_: Any, **__: Any) -> None:
    METER.get().check((len(text) >> 7) * len(needle or ""))  # CPython's reverse search is quadratic


def _guard_indent(text: Any, width: int | str = 4, *_: Any, **__: Any) -> None:
    margin = width if isinstance(width, int) else len(width)
    METER.get().check((str(text).count("\n") + 1) * margin)


def _guard_batch(_: Any, linecount: int, fill_with: Any = None) -> None:
    METER.get().check(8 * linecount)


def _guard_slice(_: Any, slices: int, fill_with: Any = None) -> None:
    METER.get().check(8 * slices)


def _guard_round(_: Any, precision: int = 0, method: str = "common") -> None:
    METER.get().check(abs(precision), 300)


METHOD_GUARDS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _guard_width),
    **dict.fromkeys(("rfind", "rindex", "rsplit", "rpartition"), _guard_reverse_search),
    "replace": _guard_replace,
}
FILTER_GUARDS: dict[str, Callable[..., None]] = {
    "center": _guard_width,
    "replace": _guard_replace,
    "indent": _guard_indent,
    "batch": _guard_batch,
    "slice": _guard_slice,
    "round": _guard_round,
}


def modulo(left: Any, right: Any) -> Any:
    """`left % right`, which for strings is formatting."""
    if isinstance(left, str):
        if re.search(r"%(\([^)]*\))?[-+ #0-9.]*\*", left):
            raise ChatTemplateError("a width of '*' in a % format is not allowed in a template")
        meter = METER.get()
        times = left.count("%") if isinstance(right, Mapping) else 1  # a mapping's values can be used many times
        meter.check(len(left) + padding(left) + times * meter.weigh(right)[0])
    return left % right


def multiply(left: Any, right: Any) -> Any:
    """`left * right`, which may repeat a string or list."""
    meter = METER.get()
    for many, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(many, str | list | tuple):
            meter.check(meter.weigh(many)[0] * max(times, 0))
    return left * right


def power(left: Any, right: Any) -> Any:
    """`left ** right`."""
    if isinstance(left, int) and isinstance(right, int):
        METER.get().check(left.bit_length() * right, INT_BITS)
    return left**right


def format_text(text: Any, *args: Any, **kwargs: Any) -> str:
    """`text|format(a, b)`: the % operator."""
    return modulo(str(text), kwargs or args)
