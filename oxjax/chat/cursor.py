"""Reading a text that arrives in pieces, so that what is read never depends on where the pieces were cut.

Readers are generators: they yield when the answer needs more text than has come, and go on when there is more. A
reader decides nothing that later text could change.
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
    """The text does not have the expected form; it is ordinary text."""


class Delimiters:
    """Texts to look for, of which the earliest counts and, at the same place, the longest."""

    def __init__(self, texts: tuple[str, ...]):
        ordered = sorted(set(texts), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered)) or "(?!)")
        self._prefixes = {text[:n] for text in ordered for n in range(len(text))}
        self._longest = len(ordered[0]) if ordered else 0

    def search(self, text: str, at: int, final: bool) -> tuple[int, str | None]:
        """The first delimiter from `at` on.

        Returns:
            where it is, and which; or the place up to which there certainly is none, and None.
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
        """The delimiter at `at`, None if there is none, False if more text is needed to say."""
        if not final and text[at:] in self._prefixes:
            return False
        match = self._pattern.match(text, at)
        return match.group() if match else None


delimiters = lru_cache(maxsize=1024)(lambda *texts: Delimiters(texts))


class Cursor:
    """A place in a growing text.

    Attributes:
        text: what has come and is not done with.
        at: the place in it.
        final: no more will come.
    """

    def __init__(self) -> None:
        self.text, self.at, self.final = "", 0, False

    def drop_read(self) -> None:
        """Forget the text before the place."""
        self.text, self.at = self.text[self.at :], 0

    def skip_space(self) -> Reader[None]:
        """Go to the next character that is not white space."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self.text) or self.final:
                return
            yield

    def take(self, *options: str) -> Reader[str | None]:
        """Go past the one of these texts that comes next, if one does."""
        while (found := delimiters(*options).match(self.text, self.at, self.final)) is False:
            yield
        if found is None:
            return None
        self.at += len(str(found))
        return str(found)

    def expect(self, text: str) -> Reader[None]:
        """Go past a text that has to come next.

        Raises:
            Malformed: it does not.
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
        """Read up to one of these texts, and go past it.

        Returns:
            the text before it, and which it was.

        Raises:
            Malformed: none comes.
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
        """Read from a bracket to the one that closes it; brackets within quotes do not count.

        Args:
            quotes: what begins and ends a quoted text.
            escape: within quotes the character after it means itself; empty for none.

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
    """The value of a JSON text, line ends within strings allowed.

    Raises:
        Malformed: it is not JSON, or holds what JSON and UTF-8 cannot write again (NaN, half a surrogate pair).
    """
    try:
        value = json.loads(text, strict=False, parse_constant=_not_a_number)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise Malformed from error
    return value


def _not_a_number(name: str) -> None:
    raise Malformed(name)
