"""Guard against special tokens in users' texts: within a template they stay ordinary text."""

from __future__ import annotations

import re
from collections.abc import Collection

from oxjax.tokenizer.tokenizer import Tokenizer

_GUARD = "\ufdd0"  # never a character of a text (Unicode 23.7); here a place where no special token may lie


class Guard:
    """Marks texts of control tokens that must stay ordinary text, and encodes marked texts.

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
        """Text with a mark in every control token that it spells."""
        return self._control.sub(lambda m: m[0][0] + _GUARD + m[0][1:], text.replace(_GUARD, ""))

    def encode(self, text: str) -> list[int]:
        """Encode a text with marks; unmarked control tokens become their ids."""
        return [i for part in text.split(_GUARD) for i in self._encode(part, add_special=False)]

    def plain(self, text: str) -> str:
        """Text without its marks."""
        return text.replace(_GUARD, "")
