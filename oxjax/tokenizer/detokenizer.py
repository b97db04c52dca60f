"""Detokenizer: ids to text, a token at a time, without ever splitting a character."""

from __future__ import annotations

import codecs
import copy
import re
from collections.abc import Callable
from typing import SupportsIndex

_PUNCTUATION = re.compile(r" (?=[?!.,])")
_CONTRACTION = re.compile(r" (?='(?:[sm]|re|ve))")
# The end of a text that the next characters could still change: a space, and what a rule may look at after it.
_UNDECIDED = re.compile(r" [ ']*[rv]?\Z")


def clean_spaces(text: str) -> str:
    """Drop the spaces that English tokenisers put before punctuation and contractions (llama.cpp's three passes)."""
    return _CONTRACTION.sub("", _PUNCTUATION.sub("", text).replace(" ' ", "'"))


class IncrementalDetokenizer:
    """Text of a growing list of ids.

    Invariant: the texts returned so far are a prefix of the text of all ids, and with `flush` they are that text.
    Uncertain text is held back: an unfinished UTF-8 character, a space that cleaning may drop.
    """

    def __init__(self, piece: Callable[[SupportsIndex], bytes | None], *, clean: bool, strip_first_space: bool):
        """Make one.

        Args:
            piece: bytes of a token, None for one to be skipped.
            clean: drop spaces as `clean_spaces` does.
            strip_first_space: the first token's leading space is the tokeniser's, not the text's.
        """
        self._piece, self._clean, self._strip = piece, clean, strip_first_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def copy(self) -> IncrementalDetokenizer:
        """Copy with the same ids so far."""
        other = copy.copy(self)
        other._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        other._utf8.setstate(self._utf8.getstate())
        return other

    def push(self, token: SupportsIndex) -> str:
        """Add a token; returns the text that is certain now: usually the token's own, sometimes none or more.

        Raises:
            TokenizerError: the id is not in the vocabulary.
        """
        piece = self._piece(token)
        if piece is None:
            return ""
        if self._strip:
            piece, self._strip = piece.removeprefix(b" "), False
        text = self._held + self._utf8.decode(piece)
        undecided = _UNDECIDED.search(text) if self._clean else None
        cut = undecided.start() if undecided else len(text)
        self._held = text[cut:]
        return clean_spaces(text[:cut]) if self._clean else text[:cut]

    def flush(self) -> str:
        """Return the rest, with U+FFFD for an unfinished character. The next push starts anew, mid-text."""
        text = self._held + self._utf8.decode(b"", final=True)
        self._held = ""
        return clean_spaces(text) if self._clean else text
