"""GBNF, the grammar notation of llama.cpp, as a Lark grammar.

Source: llama.cpp, `grammars/README.md` and `src/llama-grammar.cpp`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn

from oxjax.errors import GrammarError

_MAX_DEPTH = 50  # of parentheses; the Lark parser that reads the result allows about as many
MAX_RULES = 1000  # llguidance descends from rule to rule on the stack of its thread
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_REPEAT = re.compile(r"\{[ \t\r\n]*([0-9]{1,9})[ \t\r\n]*(?:(,)[ \t\r\n]*([0-9]{1,9})?[ \t\r\n]*)?\}")
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|([trn\\\"\[\]]))")
_TOKEN = re.compile(r"(!?)<(?:\[([0-9]{1,9})\]|([^>\r\n]+))>")
_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_LETTERS = {"t": 9, "r": 13, "n": 10}


class _Reference(NamedTuple):
    name: str
    position: int


_Pieces = list["str | _Reference"]


def gbnf_to_lark(text: str, token_id: Callable[[str], int | None]) -> str:
    """Translate a GBNF grammar to a Lark grammar of the same language.

    A character is a lexeme of its own: longer ones would be matched greedily, and GBNF is not. Only a grammar without
    recursion or tokens is one lexeme, a regular expression, where nothing is left to cut.

    Args:
        text: rules; the start rule is `root`, or the first one if there is no `root`.
        token_id: returns the id of the token with a text, for `<token>`.

    Raises:
        GrammarError: the text is not GBNF, or uses an undefined rule.
    """
    parser = _Parser(text, token_id)
    rules = parser.rules()
    for pieces in rules.values():
        for piece in pieces:
            if isinstance(piece, _Reference) and piece.name not in rules:
                parser.fail(f"found {piece.name!r}, which is no rule of this grammar", piece.position)
    letter = "R" if not parser.has_tokens and not _is_recursive(rules) else "r"
    names = {name: f"{letter}{i}" for i, name in enumerate(rules)}
    lines = [f"start: {names['root' if 'root' in rules else next(iter(rules))]}"]
    for name, pieces in rules.items():
        lines.append(f"{names[name]}: " + " ".join(p if isinstance(p, str) else names[p.name] for p in pieces))
    return "\n".join(lines)


def _is_recursive(rules: dict[str, _Pieces]) -> bool:
    """True if a rule uses itself, directly or through others."""
    uses = {name: {p.name for p in pieces if isinstance(p, _Reference)} for name, pieces in rules.items()}
    used_by: dict[str, list[str]] = {name: [] for name in rules}
    for name, used in uses.items():
        for other in used:
            used_by[other].append(name)
    waiting = {name: len(used) for name, used in uses.items()}
    ready = [name for name, count in waiting.items() if not count]
    for name in ready:
        for user in used_by[name]:
            waiting[user] -= 1
            if not waiting[user]:
                ready.append(user)
    return len(ready) < len(rules)


class _Parser:
    """Parser of one pass over the text; `position` is the index of the next character."""

    def __init__(self, text: str, token_id: Callable[[str], int | None]):
        self.text, self.position, self.token_id, self.has_tokens = text, 0, token_id, False

    def fail(self, message: str, position: int | None = None) -> NoReturn:
        at = self.position if position is None else position
        line = self.text.count("\n", 0, at) + 1
        raise GrammarError(message, line=line, column=at - self.text.rfind("\n", 0, at))

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self.text, self.position)
        if found:
            self.position = found.end()
        return found

    def peek(self) -> str:
        return self.text[self.position : self.position + 1]

    def found(self) -> str:
        return f"found {self.peek()!r}" if self.peek() else "found the end"

    def rules(self) -> dict[str, _Pieces]:
        rules: dict[str, _Pieces] = {}
        self.match(_SPACE_AND_LINES)
        while self.peek():
            start = self.position
            name = self.match(_NAME)
            if not name:
                self.fail(f"{self.found()}; expected the name of a rule")
            self.match(_SPACE)
            if not self.text.startswith("::=", self.position):
                self.fail(f"{self.found()}; expected '::=' after the name {name[0]!r}")
            self.position += 3
            self.match(_SPACE_AND_LINES)
            if name[0] in rules:
                self.fail(f"found a second rule {name[0]!r}; expected one", start)
            if len(rules) == MAX_RULES:
                self.fail(f"found more than {MAX_RULES} rules; expected fewer", start)
            rules[name[0]] = list(self.alternatives(0))
            if self.peek() not in ("", "\r", "\n"):
                self.fail(f"{self.found()}; expected a symbol or the end of the line")
            self.match(_SPACE_AND_LINES)
        if not rules:
            self.fail("found no rule; expected at least one")
        return rules

    def alternatives(self, depth: int) -> Iterator[str | _Reference]:
        yield from self.sequence(depth)
        while self.peek() == "|":
            self.position += 1
            self.match(_SPACE_AND_LINES)
            yield "|"
            yield from self.sequence(depth)

    def sequence(self, depth: int) -> Iterator[str | _Reference]:
        space = _SPACE_AND_LINES if depth else _SPACE
        is_empty = True
        while symbol := self.symbol(depth):
            is_empty = False
            self.match(space)
            while repeat := self.repeat():
                symbol = ["(", *symbol, ")" + repeat]
                self.match(space)
            yield from symbol
        if is_empty:
            yield '""'

    def symbol(self, depth: int) -> _Pieces | None:
        """Read the next symbol without its repetition; None at the end of a sequence."""
        start, character = self.position, self.peek()
        if character == '"':
            self.position += 1
            return ["(", *self.literal(start), ")"]
        if character == "[":
            self.position += 1
            return [self.character_class(start)]
        if character == ".":
            self.position += 1
            return [r"/[\x{0}-\x{10ffff}]/"]
        if character == "(":
            return self.group(depth)
        if character in ("<", "!"):
            return [self.token()]
        name = self.match(_NAME)
        return [_Reference(name[0], start)] if name else None

    def group(self, depth: int) -> _Pieces:
        if depth == _MAX_DEPTH:
            self.fail(f"found more than {_MAX_DEPTH} parentheses inside each other; expected fewer")
        start = self.position
        self.position += 1
        self.match(_SPACE_AND_LINES)
        inner = list(self.alternatives(depth + 1))
        if self.peek() != ")":
            self.fail(f"{self.found()}; expected a symbol or ')'" if self.peek() else "'(' is never closed", start)
        self.position += 1
        return ["(", *inner, ")"]

    def literal(self, start: int) -> Iterator[str]:
        if self.peek() == '"':
            yield '""'
        while self.peek() != '"':
            yield f"/{_code(self.character(start))}/"
        self.position += 1

    def character_class(self, start: int) -> str:
        negated = self.peek() == "^"
        self.position += negated
        ranges = []
        while self.peek() != "]":
            at = self.position
            low = high = self.character(start)
            if self.peek() == "-" and self.text[self.position + 1 : self.position + 2] != "]":
                self.position += 1
                high = self.character(start)
            if low > high:
                self.fail(f"found the range {self.text[at : self.position]!r}; expected it in order", at)
            ranges.append(f"{_code(low)}-{_code(high)}")
        if not ranges:
            self.fail("found a class of no characters; expected at least one", start)
        self.position += 1
        return f"/[{'^' * negated}{''.join(ranges)}]/"

    def character(self, start: int) -> int:
        """Read the code point of the next character of the literal or class that began at `start`."""
        at, found = self.position, self.peek()
        if not found:
            self.fail(f"{self.text[start]!r} is never closed", start)
        if found == "\\":
            escape = self.match(_ESCAPE)
            if not escape:
                expected = r"\xXX, \uXXXX, \UXXXXXXXX, \t, \r, \n, \\, \", \[ or \]"
                self.fail(f"found the escape {self.text[at : at + 2]!r}; expected {expected}")
            digits = escape[1] or escape[2] or escape[3]
            code = int(digits, 16) if digits else _LETTERS.get(escape[4], ord(escape[4]))
        else:
            self.position += 1
            code = ord(found)
        if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            self.fail(f"found the code point {code:#x}; expected a Unicode character", at)
        return code

    def token(self) -> str:
        start = self.position
        found = self.match(_TOKEN)
        if not found:
            self.fail("expected <token>, <[id]>, !<token> or !<[id]>")
        token = int(found[2]) if found[2] else self.token_id(f"<{found[3]}>")
        if token is None:
            self.fail(f"found <{found[3]}>, which is no token of this vocabulary", start)
        self.has_tokens = True
        return f"<[{'^' if found[1] else ''}{token}]>"

    def repeat(self) -> str | None:
        """Read a repetition, in Lark's notation; None if there is none."""
        character = self.peek()
        if character and character in "*+?":
            self.position += 1
            return character
        if character != "{":
            return None
        start, found = self.position, self.match(_REPEAT)
        if not found:
            self.fail("expected {m}, {m,} or {m,n} with numbers of at most nine digits")
        least, comma, most = found.groups()
        if most and int(most) < int(least):
            self.fail(f"found {found[0]!r}; expected the lower bound first", start)
        return f"{{{least}{comma or ''}{most or ''}}}"


def _code(code: int) -> str:
    return f"\\x{{{code:x}}}"
