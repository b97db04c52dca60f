"""Sampled tokens on the host, one by one."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import numpy as np

from oxjax.errors import NonFiniteLogitsError, NothingLeftError, RequestError
from oxjax.sampling.pipeline import NOT_FINITE, NOTHING_LEFT, Sampled

Columns = list[np.ndarray]  # fields of `Sampled`, in their order


class SampledToken(NamedTuple):
    """An entry of `Sampled`, with its fields in their order."""

    token: int
    logprob: float
    rank: int
    top_tokens: list[int]
    top_logprobs: list[float]
    mu: float
    fault: int

    def error(self, position: int) -> RequestError | None:
        """The error that there is no token for this position, if so."""
        if self.fault == NOT_FINITE:
            return NonFiniteLogitsError(f"the logits for position {position} hold NaN or infinity")
        if self.fault == NOTHING_LEFT:
            return NothingLeftError(f"no token may follow at position {position}: all are forbidden")
        return None

    def pairs(self, n_top: int) -> tuple[tuple[int, float], ...]:
        """(id, log-probability) of the token, then of the `n_top` most likely others; empty for 0."""
        if not n_top:
            return ()
        top = zip(self.top_tokens[:n_top], self.top_logprobs[:n_top], strict=True)
        return (self.token, self.logprob), *((i, x) for i, x in top if i != self.token and x > -math.inf)


def to_host(sampled: Sampled) -> Columns:
    """Copy sampled tokens to the host."""
    return jax.device_get(jax.tree.leaves(sampled))


def sampled_tokens(columns: Columns) -> list[SampledToken]:
    """The sampled tokens of columns without an axis of steps."""
    return [SampledToken(*entry) for entry in zip(*(column.tolist() for column in columns), strict=True)]
