"""Texts of people inside a template: a special token that one spells stays the ordinary text that it is."""

from __future__ import annotations

import re
from collections.abc import Collection

from oxjax.tokenizer.tokenizer import Tokenizer

_GUARD = "\ufdd0"  # never a character of a text (Unicode 23.7); here a place where no special token may lie


class Guard:
    """Marks what may not be read as control tokens, and encodes what is marked.

    Tokens that the file calls user-defined, not control, are not protected: any text may contain them.

    Args:
        tokenizer: the model's.
        allowed: control tokens that any text may contain.
    """

    def __init__(self, tokenizer: Tokenizer, allowed: Collection[str] = ()):
        self._encode = tokenizer.encode
        control = (t for t in tokenizer.control_texts if len(t) > 1 and t not in allowed)
        self._control = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")

    def protect(self, text: str) -> str:
        """The same text with a mark in every control token that it spells."""
        return self._control.sub(lambda m: m[0][0] + _GUARD + m[0][1:], text.replace(_GUARD, ""))

    def encode(self, text: str) -> list[int]:
        """Ids of a text with marks; control tokens that it spells without one are read as those."""
        return [i for part in text.split(_GUARD) for i in self._encode(part, add_special=False)]

    def plain(self, text: str) -> str:
        """The text without its marks."""
        return text.replace(_GUARD, "")
