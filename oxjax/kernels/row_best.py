"""The largest number of each row, and what a log-softmax needs of the others, without writing it out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oxjax.kernels import native
from oxjax.kernels.dot import row_sum


def row_best(
    x: Float[Array, "rows d"], *, exact: bool
) -> tuple[Int[Array, " rows"], Float[Array, " rows"], Float[Array, " rows"]]:
    """Of each float32 row: where its largest number comes first, that number, and the sum of e^(x − largest).

    The log-softmax is `x - largest - log(sum)`. Where a number is not finite the sum is NaN, else it is at least 1.

    Args:
        x: rows of logits.
        exact: the bits of a row do not depend on other rows.
    """
    if native.kernels():
        kinds = (jnp.int32, jnp.float32, jnp.float32)
        return tuple(jax.ffi.ffi_call("oxjax_row_best", [jax.ShapeDtypeStruct(x.shape[:1], k) for k in kinds])(x))
    largest = jnp.max(x, axis=-1)
    total = row_sum(jnp.exp(x - largest[:, None]), exact=exact)[:, 0]
    total = jnp.where(jnp.all(jnp.isfinite(x), axis=-1), total, jnp.nan)
    return jnp.argmax(x, axis=-1).astype(jnp.int32), largest, total
