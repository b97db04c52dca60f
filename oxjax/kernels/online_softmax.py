"""Online softmax: attention that takes its keys block by block, and products by head.

Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867. The values have a column of ones beside them, whose sum
is the denominator.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

MASKED = -1e30  # finite, so that a row with nothing to see yet does not make NaN

Sums = tuple[Array, Array]  # each row's largest score so far, `[..., 1]`; sums relative to it, `[..., value_dim + 1]`


def no_sums(*shape: int, value_dim: int) -> Sums:
    """Sums of rows that have seen no keys."""
    return jnp.full((*shape, 1), MASKED, jnp.float32), jnp.zeros((*shape, value_dim + 1), jnp.float32)


def with_ones(v: Float[Array, "... value_dim"]) -> Float[Array, "... value_dim_plus_1"]:
    """Values as `add_block` takes them."""
    return jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1), v.dtype)], axis=-1)


def add_block(
    sums: Sums,
    scores: Float[Array, "batch heads rows keys"],
    visible: Bool[Array, "... rows keys"],
    v: Float[Array, "batch heads keys value_dim_plus_1"],
) -> Sums:
    """The sums once the rows have seen another block of keys."""
    best, total = sums
    scores = jnp.where(visible, scores, MASKED)
    new_best = jnp.maximum(best, jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(visible, jnp.exp(scores - new_best), 0.0)
    total = total * jnp.exp(best - new_best) + batched_dot(weights.astype(v.dtype), v, contract=2)
    return new_best, total


def batched_dot(
    a: Float[Array, "batch heads n _"], b: Float[Array, "batch heads _ _"], *, contract: int
) -> Float[Array, "batch heads n _"]:
    """Product over a's last axis and b's axis `contract`, in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((3,), (contract,)), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
