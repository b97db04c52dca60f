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


class Dry:
    """What has been said, and what would say it again.

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
        growth = math.log(params.dry_base)
        self._most = params.dry_allowed_length + (math.floor(math.log(_MOST) / growth) if growth else 0)

    def push(self, token: int) -> None:
        """Take the next token of the text, prompt included."""
        self._n_tokens += 1
        if self._breaks(token):
            self._start = self._n_tokens
        text = self._tail + self._token_bytes(token)
        self._tail = text[max(0, len(text) - self._keep) :]

    def _breaks(self, token: int) -> bool:
        """Whether a breaker ends within this token, if it comes next."""
        text = self._tail + self._token_bytes(token)
        return any(breaker in text for breaker in self._breakers)

    def penalties(self, tokens: Sequence[int]) -> list[tuple[int, float]]:
        """What is subtracted from the logits of tokens that would continue a repetition; each token once.

        Args:
            tokens: all that were pushed.
        """
        p = self.params
        window = len(tokens) if p.dry_window is None else min(p.dry_window, len(tokens))
        longest = min(len(tokens) - self._start, self._most)
        if window <= p.dry_allowed_length or longest < p.dry_allowed_length:
            return []
        last = np.array(tokens[len(tokens) - window :], np.int32)
        ends = np.flatnonzero(last[:-1] == last[-1])  # of what has been said before, and is being said again
        found: dict[int, int] = {}
        for length in range(1, longest + 1):
            if length >= p.dry_allowed_length:
                found |= dict.fromkeys(last[ends + 1].tolist(), length)
            ends = ends[ends >= length]
            ends = ends[last[ends - length] == last[-1 - length]] if length < window else ends[:0]
            if not len(ends):
                break
        return [
            (token, min(p.dry_multiplier * p.dry_base ** (length - p.dry_allowed_length), _MOST))
            for token, length in found.items()
            if not self._breaks(token)
        ]
