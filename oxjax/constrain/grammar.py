"""Grammars of requests: GBNF, JSON schema, regular expression, Lark, choices."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from oxjax.constrain.gbnf import MAX_RULES
from oxjax.errors import GrammarError

MAX_SOURCE = 1 << 18
# llguidance descends from rule to rule, and from reference to reference, on the stack of its thread.
_MAX_LARK, _MAX_REFERENCES = 1 << 15, 1000
_LARK_RULE = re.compile(r"^\s*[\w?!].*?:", re.MULTILINE)
_MAX_SCHEMA_DEPTH = 100  # llguidance reads JSON up to a depth of 128
_MAX_MULTIPLE_DIGITS = 5  # it builds a state for every remainder

KINDS = ("gbnf", "json_schema", "regex", "lark", "choice")
JSONValue = dict | list | str | int | float | bool | None


@dataclass(frozen=True)
class Grammar:
    """Grammar that an output must match. Plain data: hashable, and stored as its two strings.

    Use one of the constructors `gbnf`, `json_schema`, `regex`, `lark` and `choice`.

    Attributes:
        kind: the notation: one of `KINDS`.
        source: the grammar in that notation; JSON for a schema or a list of choices. At most `MAX_SOURCE` characters,
            an eighth of it for Lark.

    Raises:
        GrammarError: wrong type, too large, or malformed JSON.
    """

    kind: str
    source: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise GrammarError(f"kind: found {self.kind!r}; expected one of {', '.join(KINDS)}")
        if not isinstance(self.source, str):
            raise GrammarError(f"{self.kind}: found {type(self.source).__name__}; expected a string")
        limit = _MAX_LARK if self.kind == "lark" else MAX_SOURCE
        if len(self.source) > limit:
            raise GrammarError(f"{self.kind}: found {len(self.source)} characters; expected at most {limit}")
        try:
            self.source.encode()
        except UnicodeEncodeError as error:
            raise GrammarError(f"{self.kind}: found a lone surrogate at {error.start}; expected text") from None
        if self.kind == "lark" and len(_LARK_RULE.findall(self.source)) > MAX_RULES:
            raise GrammarError(f"lark: found more than {MAX_RULES} rules; expected fewer")
        if self.kind == "json_schema":
            _check_schema(_parse_json(self.source))
        elif self.kind == "choice":
            _check_choices(_parse_json(self.source))

    @classmethod
    def gbnf(cls, text: str) -> Grammar:
        """Grammar in llama.cpp's notation; the start rule is `root`, or the first one if there is no `root`."""
        return cls("gbnf", text)

    @classmethod
    def json_schema(cls, schema: dict | bool | str) -> Grammar:
        """JSON that is valid under a schema (Draft 2020-12, as far as llguidance supports it).

        Properties have the order of the schema. Between two symbols the output may have a space, or a line break and
        up to 20 spaces or tabs.

        Args:
            schema: the schema, or its text.
        """
        return cls("json_schema", schema if isinstance(schema, str) else _dump(schema, "json_schema"))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that a regular expression matches as a whole (syntax of Rust's `regex`, no look-around)."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Grammar in llguidance's variant of Lark. Its terminals match greedily, and `<token>` is a special token."""
        return cls("lark", text)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Grammar:
        """One of several texts; one may be a prefix of another."""
        if isinstance(texts, str):
            raise GrammarError("choice: found a string; expected a list of strings")
        return cls("choice", _dump(list(texts), "choice"))


def _dump(value: object, kind: str) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"{kind}: {error}; expected what JSON can write") from None


def _parse_json(source: str) -> JSONValue:
    def refuse(constant: str) -> None:
        raise GrammarError(f"found {constant}; expected JSON, which has no such number")

    try:
        return json.loads(source, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise GrammarError(f"not JSON: {error.msg}", line=error.lineno, column=error.colno) from None
    except (RecursionError, ValueError) as error:
        raise GrammarError(f"not JSON that can be read: {error}") from None


def _check_schema(schema: JSONValue) -> None:
    if not isinstance(schema, dict | bool):
        raise GrammarError(f"json_schema: found {type(schema).__name__}; expected an object or a boolean")
    if isinstance(schema, dict) and "x-guidance" in schema:
        raise GrammarError("json_schema: found 'x-guidance'; expected keywords of JSON Schema only")
    level: list[JSONValue] = [schema]
    depth = references = 0
    while level:
        depth += 1
        references += sum(isinstance(value, dict) and "$ref" in value for value in level)
        if references > _MAX_REFERENCES:
            raise GrammarError(f"json_schema: found more than {_MAX_REFERENCES} $ref; expected fewer")
        if depth > _MAX_SCHEMA_DEPTH:
            raise GrammarError(f"json_schema: nested deeper than {_MAX_SCHEMA_DEPTH}; expected less")
        for value in level:
            _check_multiple(value)
        inner = (list(v.values()) if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
        level = [value for values in inner for value in values]


def _check_multiple(schema: JSONValue) -> None:
    multiple = schema.get("multipleOf") if isinstance(schema, dict) else None
    if isinstance(multiple, int | float):
        digits = len(Decimal(str(multiple)).normalize().as_tuple().digits)
        if digits > _MAX_MULTIPLE_DIGITS:
            expected = f"expected at most {_MAX_MULTIPLE_DIGITS} digits"
            raise GrammarError(f"json_schema: multipleOf: found {multiple}; {expected}")


def _check_choices(choices: JSONValue) -> None:
    if not isinstance(choices, list) or not choices:
        raise GrammarError("choice: expected a list of at least one string")
    for text in choices:
        if not isinstance(text, str) or not text:
            raise GrammarError(f"choice: found {text!r}; expected strings that are not empty")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise GrammarError(f"choice: found a lone surrogate in {text!r}; expected text") from None
