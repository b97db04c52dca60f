"""Cursor over a text that arrives in pieces; the result never depends on where the pieces were cut.

Readers are generators: they yield when they need more text, and continue when there is more. A reader decides nothing
that later text could change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from functools import lru_cache
from typing import Any, TypeVar

T = TypeVar("T")
Reader = Generator[None, None, T]  # yields for more text, returns what was read

_SPACE = " \t\r\n"
_NAME = re.compile(r"[^\s<>{}\[\]()|\"'`,;=]*")
_OPEN, _CLOSE = "([{", ")]}"


class Malformed(Exception):
    """Raised when text does not have the expected form; it is ordinary text then."""


class Delimiters:
    """Set of texts to search for; the earliest match counts and, at the same place, the longest."""

    def __init__(self, texts: tuple[str, ...]):
        ordered = sorted(set(texts), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered)) or "(?!)")
        self._prefixes = {text[:n] for text in ordered for n in range(len(text))}
        self._longest = len(ordered[0]) if ordered else 0

    def search(self, text: str, at: int, final: bool) -> tuple[int, str | None]:
        """Find the first delimiter from `at` on.

        Returns:
            its index and text; or the index before which there certainly is none, and None.
        """
        match = self._pattern.search(text, at)
        if not final:
            last = match.start() + 1 if match else len(text)
            for start in range(max(at, len(text) - self._longest + 1), last):
                if text[start:] in self._prefixes:
                    return start, None
        return (match.start(), match.group()) if match else (len(text), None)

    def partial(self, text: str) -> int:
        """Number of trailing characters that may be the start of a delimiter."""
        starts = range(max(0, len(text) - self._longest + 1), len(text))
        return next((len(text) - start for start in starts if text[start:] in self._prefixes), 0)

    def match(self, text: str, at: int, final: bool) -> str | bool | None:
        """Delimiter at `at`; None if there is none, False if more text is needed to decide."""
        if not final and text[at:] in self._prefixes:
            return False
        match = self._pattern.match(text, at)
        return match.group() if match else None


delimiters = lru_cache(maxsize=1024)(lambda *texts: Delimiters(texts))


class Cursor:
    """Reading position in a growing text.

    Attributes:
        text: received, and not dropped yet.
        at: index of the next character.
        final: the text is complete.
    """

    def __init__(self) -> None:
        self.text, self.at, self.final = "", 0, False

    def drop_read(self) -> None:
        """Drop the text before `at`."""
        self.text, self.at = self.text[self.at :], 0

    def skip_space(self) -> Reader[None]:
        """Skip white space."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self.text) or self.final:
                return
            yield

    def take(self, *options: str) -> Reader[str | None]:
        """Read one of these texts, if one comes next."""
        while (found := delimiters(*options).match(self.text, self.at, self.final)) is False:
            yield
        if found is None:
            return None
        self.at += len(str(found))
        return str(found)

    def expect(self, text: str) -> Reader[None]:
        """Read a text that must come next.

        Raises:
            Malformed: another text comes.
        """
        if text and (yield from self.take(text)) is None:
            raise Malformed

    def name(self) -> Reader[str]:
        """Read the name of a function, or an identifier like one.

        Raises:
            Malformed: there is none.
        """
        while True:
            found = _NAME.match(self.text, self.at)
            assert found is not None  # the empty text at least
            if (end := found.end()) < len(self.text) or self.final:
                break
            yield
        name, self.at = self.text[self.at : end], end
        if not name:
            raise Malformed
        return name

    def until(self, *ends: str) -> Reader[tuple[str, str]]:
        """Read up to and including one of these texts.

        Returns:
            the text before it, and the text found.

        Raises:
            Malformed: none of them comes.
        """
        begin = at = self.at
        while True:
            at, found = delimiters(*ends).search(self.text, at, self.final)
            if found is not None:
                self.at = at + len(found)
                return self.text[begin:at], found
            if self.final:
                raise Malformed
            yield

    def balanced(self, quotes: tuple[str, ...] = ('"',), escape: str = "\\") -> Reader[str]:
        """Read a bracketed text, from a bracket to its closing one; brackets within quotes do not count.

        Args:
            quotes: delimiter of quoted text.
            escape: character that escapes the next one within quotes; empty for none.

        Raises:
            Malformed: there is no bracket here, or none closes it.
        """
        if (yield from self.take(*_OPEN)) is None:
            raise Malformed
        begin, at, depth, quote = self.at - 1, self.at, 1, ""
        while depth:
            wanted = (quote, escape) if quote and escape else (quote,) if quote else (*quotes, *_OPEN, *_CLOSE)
            at, found = delimiters(*wanted).search(self.text, at, self.final)
            if found is None or (found == escape and at + 1 == len(self.text)):
                if self.final:
                    raise Malformed
                yield
                continue
            at += len(found)
            if found == escape:
                at += 1
            elif quote or found in quotes:
                quote = "" if quote else found
            else:
                depth += 1 if found in _OPEN else -1
        self.at = at
        return self.text[begin:at]

    def json(self) -> Reader[Any]:
        """Read a JSON object or array.

        Raises:
            Malformed: there is none here.
        """
        yield from self.skip_space()
        if self.text[self.at : self.at + 1] not in ("{", "["):
            raise Malformed
        return parse_json((yield from self.balanced()))


def parse_json(text: str) -> Any:
    """Parse JSON; line breaks within strings are allowed.

    Raises:
        Malformed: it is not JSON, or has values that JSON and UTF-8 cannot encode (NaN, half a surrogate pair).
    """
    try:
        value = json.loads(text, strict=False, parse_constant=_not_a_number)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise Malformed from error
    return value


def _not_a_number(name: str) -> None:
    raise Malformed(name)
