"""PLaMo 2's tokeniser (`plamo2`): the cheapest segmentation, counted in integers from the end of the text."""

from __future__ import annotations

import math

from oxjax.errors import TokenizerError
from oxjax.tokenizer.vocab import BYTE, Vocabulary

_SCALE, _UNKNOWN, _INVALID = 1e4, -10_000_000, -20_000_000


class Plamo2Encoder:
    """Text without special tokens -> ids. A character that no token covers is its UTF-8 bytes."""

    def __init__(self, vocab: Vocabulary):
        self._bytes = [vocab.ids.get(f"<0x{b:02X}>") for b in range(256)]
        if None in self._bytes:
            raise TokenizerError(
                f"{vocab.source}: tokenizer.ggml.tokens: found no <0x{self._bytes.index(None):02X}>; "
                "expected a token for every byte"
            )
        self._scores: dict[str, tuple[int, int]] = {}
        lengths: dict[str, set[int]] = {}
        for i, (text, score) in enumerate(zip(vocab.texts, vocab.scores.tolist(), strict=True)):
            if vocab.types[i] & BYTE or not math.isfinite(score):
                continue
            # Away from zero at one half, like C's round; Python's goes to the even neighbour.
            value = int(math.copysign(math.floor(abs(score) * _SCALE + 0.5), score))
            if value > _INVALID:
                self._scores[text] = (i, value)
                lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {head: sorted(found, reverse=True) for head, found in lengths.items()}

    def __call__(self, text: str) -> list[int]:
        """Ids of a text; a byte order mark at its beginning is dropped."""
        text = text.removeprefix("\ufeff")
        n = len(text)
        cost, size, token = [0] * (n + 1), [1] * (n + 1), [-1] * (n + 1)
        for i in range(n - 1, -1, -1):
            cost[i] = cost[i + 1] - _UNKNOWN
            # Longest first: of equally cheap tokens the longest wins, and a token wins over an unknown character.
            for length in reversed(self._lengths.get(text[i], ())):
                found = self._scores.get(text[i : i + length])
                if found is not None and i + length <= n and cost[i + length] - found[1] <= cost[i]:
                    cost[i], size[i], token[i] = cost[i + length] - found[1], length, found[0]
        out, at = [], 0
        while at < n:
            out += [token[at]] if token[at] >= 0 else [self._bytes[b] for b in text[at].encode()]
            at += size[at]
        return out
