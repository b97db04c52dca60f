"""Penalties on tokens that the text has lately had, as llama.cpp's sampler of that name defines them."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

LEAST_RECENT = 64  # tokens per row that programs are compiled for: so few cost nothing


@struct.dataclass
class Penalties:
    """Parameters per row, `[N]` each, and what they look at.

    Attributes:
        window: how many of the last tokens count.
        repetition: what logits are divided by where they are positive, and multiplied with where they are not.
        frequency: what is then subtracted for each time that a token occurs.
        presence: what is subtracted once.
        recent: the last tokens of prompt and output, `[N, R]`; before the first one -1.
    """

    window: Int[Array, " N"]
    repetition: Float[Array, " N"]
    frequency: Float[Array, " N"]
    presence: Float[Array, " N"]
    recent: Int[Array, "N R"]

    @property
    def penalizes(self) -> Bool[Array, " N"]:
        """Rows that use a penalty."""
        lowers = (self.repetition != 1.0) | (self.frequency != 0.0) | (self.presence != 0.0)
        return lowers & (self.window > 0)

    def followed_by(self, tokens: Int[Array, " N"]) -> Penalties:
        """After these tokens."""
        return self.replace(recent=jnp.concatenate([self.recent[:, 1:], tokens[:, None]], axis=1))


def penalize(logits: Float[Array, "N vocab"], p: Penalties) -> Float[Array, "N vocab"]:
    """Logits of tokens that occur in the window, lowered; rows without penalties as they are."""

    def lowered() -> Array:
        n_recent, vocab = p.recent.shape[1], logits.shape[1]
        counts = jnp.arange(n_recent, dtype=jnp.int32) >= n_recent - p.window[:, None]
        ids = jnp.where(counts & (p.recent >= 0), p.recent, vocab)
        rows = jnp.arange(len(logits), dtype=jnp.int32)[:, None]
        times = jnp.zeros(logits.shape, jnp.float32).at[rows, ids].add(1.0, mode="drop")
        repetition, frequency, presence = (a[:, None] for a in (p.repetition, p.frequency, p.presence))
        low = jnp.where(logits > 0.0, logits / repetition, logits * repetition) - (times * frequency + presence)
        return jnp.where((times > 0.0) & p.penalizes[:, None], low, logits)

    return lax.cond(jnp.any(p.penalizes), lowered, lambda: logits)


def recent_tokens(tokens: Sequence[int], n: int) -> np.ndarray:
    """The last `n` of these tokens, int32 `[n]`, after as many -1 as are missing."""
    recent = np.full(n, -1, np.int32)
    last = tokens[-n:]
    recent[n - len(last) :] = last
    return recent
