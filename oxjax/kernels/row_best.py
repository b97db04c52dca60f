"""The largest number of each row, and what a log-softmax needs of the others, without writing it out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oxjax.kernels.dot import by_tiles
from oxjax.kernels.native import ffi_call
from oxjax.kernels.numerics import Numerics


def row_best(
    x: Float[Array, "rows d"], *, numerics: Numerics
) -> tuple[Int[Array, " rows"], Float[Array, " rows"], Float[Array, " rows"]]:
    """Argmax, maximum and log(sum of e^(x − maximum)) of float32 rows; the first of equals counts.

    The log-softmax is `x - largest - log_sum`. Where a number is not finite the logarithm is NaN.

    Args:
        x: rows of logits.
        numerics: see `Numerics`; activations play no part.
    """
    if numerics.native:
        kinds = (jnp.int32, jnp.float32, jnp.float32)
        return tuple(ffi_call("row_best", [jax.ShapeDtypeStruct(x.shape[:1], k) for k in kinds])(x))

    def best(tile: Array) -> tuple[Array, Array, Array]:
        largest = jnp.max(tile, axis=-1)
        log_sum = jnp.log(jnp.sum(jnp.exp(tile - largest[:, None]), axis=-1))
        log_sum = jnp.where(jnp.all(jnp.isfinite(tile), axis=-1), log_sum, jnp.nan)
        return jnp.argmax(tile, axis=-1).astype(jnp.int32), largest, log_sum

    return by_tiles(best, x) if numerics.exact else best(x)
