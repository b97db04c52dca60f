"""DRY, "don't repeat yourself": tokens that would continue a repetition, by how long it is already. Host only.

The definition is p-e-w's (text-generation-webui, pull request 5677) as llama.cpp has it, but for breakers: those are
looked for in the text itself, wherever they begin and end within tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from oxjax.sampling.params import SamplingParams

_MOST = float(np.finfo(np.float32).max)
_FEW = 32  # tokens that are taken one after the other, and not all anew


class Dry:
    """DRY's memory of a text: its repetitions, and the tokens that would continue them.

    Args:
        params: the request's.
        token_bytes: of a token.
    """

    def __init__(self, params: SamplingParams, token_bytes: Callable[[int], bytes]):
        self.params, self._token_bytes = params, token_bytes
        self._breakers = [text.encode() for text in params.dry_breakers]
        self._keep = max(map(len, self._breakers), default=1) - 1
        self._tail = b""  # of the text: what a breaker may begin with
        self._n_tokens = self._start = 0  # a repetition goes no further back than to where the last breaker ended
        self._repeated = np.zeros(0, np.int32)  # how long what ends at each token is what ends the text as well
        growth = math.log(params.dry_base)
        self._most = params.dry_allowed_length + (math.floor(math.log(_MOST) / growth) if growth else 0)

    def push(self, token: int) -> None:
        """Take the next token of the text, prompt included."""
        self._n_tokens += 1
        text = self._tail + self._token_bytes(token)
        if self._breaks(text):
            self._start = self._n_tokens
        self._tail = text[max(0, len(text) - self._keep) :]

    def _breaks(self, text: bytes) -> bool:
        return any(breaker in text for breaker in self._breakers)

    def penalties(self, tokens: Sequence[int]) -> list[tuple[int, float]]:
        """Penalties of tokens that would continue a repetition, to be subtracted from their logits; each token once.

        Args:
            tokens: all that were pushed.
        """
        p = self.params
        self._repeated = _repeated(tokens, self._repeated)
        window = len(tokens) if p.dry_window is None else min(p.dry_window, len(tokens))
        longest = min(len(tokens) - self._start, self._most)
        if window <= p.dry_allowed_length or longest < p.dry_allowed_length:
            return []
        # Of the tokens in the window but the last, which is the text's end itself; each goes no further than it.
        lengths = np.minimum(self._repeated[len(tokens) - window : -1], np.arange(1, window))
        ends = np.flatnonzero(lengths >= p.dry_allowed_length)
        lengths = np.minimum(lengths[ends], longest)
        order, first = np.argsort(lengths, kind="stable"), len(tokens) - window + 1
        following = (tokens[first + end] for end in ends[order].tolist())
        found = dict(zip(following, lengths[order].tolist(), strict=True))  # the longest of each
        return [
            (token, min(p.dry_multiplier * p.dry_base ** (length - p.dry_allowed_length), _MOST))
            for token, length in found.items()
            if not self._breaks(self._tail + self._token_bytes(token))
        ]


def _repeated(tokens: Sequence[int], known: np.ndarray) -> np.ndarray:
    """For each token, how many tokens up to it are the last ones of all, the last itself left out.

    Args:
        tokens: int ids.
        known: the same for as many of the first of them as it is long.
    """
    if len(tokens) - len(known) > _FEW:
        return _z(tokens[::-1])[::-1]
    array = np.array(tokens, np.int32)
    for n in range(len(known) + 1, len(tokens) + 1):
        longer = np.zeros(n, np.int32)  # what ended one token before goes on where this token is the new one
        longer[1:] = known + 1
        longer[:1] = 1
        known = np.where(array[:n] == array[n - 1], longer, 0)
        known[-1] = 0
    return known


def _z(tokens: Sequence[int]) -> np.ndarray:
    """Length of the longest common prefix of the tokens with each of their suffixes; 0 for the first (Z algorithm)."""
    n = len(tokens)
    z = [0] * n
    left = right = 0
    for i in range(1, n):
        length = min(right - i, z[i - left]) if i < right else 0
        while i + length < n and tokens[length] == tokens[i + length]:
            length += 1
        z[i] = length
        if i + length > right:
            left, right = i, i + length
    return np.array(z, np.int32)
