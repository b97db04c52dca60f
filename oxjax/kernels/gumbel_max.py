"""A draw from each row's distribution by Gumbel's trick: the largest logit after noise that each column has."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Float, Int, UInt32

from oxjax.kernels.native import ffi_call
from oxjax.kernels.numerics import Numerics


def gumbel_max(
    logits: Float[Array, "rows d"], keys: UInt32[Array, "rows 2"], *, numerics: Numerics
) -> Int[Array, " rows"]:
    """Where logit plus noise is largest in each row: a draw from the softmax of its logits.

    A row's noise is that of `gumbel_noise`; neither other rows nor the number of columns matter.

    Args:
        logits: float32; -inf is never drawn where there is anything else.
        keys: of the rows.
        numerics: the backend matters, and changes no bit of the noise.
    """
    if numerics.native:
        kind = jax.ShapeDtypeStruct(logits.shape[:1], jnp.int32)
        return ffi_call("gumbel_max", kind)(logits, keys)

    def draw(row: tuple[Array, Array]) -> Array:
        logits, key = row
        return jnp.argmax(logits + gumbel_noise(key, len(logits))).astype(jnp.int32)

    return lax.map(draw, (logits, keys))


def gumbel_noise(key: UInt32[Array, " 2"], n: int) -> Float[Array, " n"]:
    """Standard Gumbel noise for columns 0 to n - 1: column i has that of Threefry-2x32's block (0, i) under this key.

    Of a block's 64 bits a number v between 0 and 1 is made, and of that -log(-log(1 - v)), float32.
    """
    at = jnp.arange(n, dtype=jnp.uint32)
    high, low = threefry2x32_p.bind(key[0], key[1], jnp.zeros_like(at), at)
    v = high.astype(jnp.float32) * 2.0**-32 + (low.astype(jnp.float32) + 0.5) * 2.0**-64
    return -jnp.log(-jnp.log1p(-jnp.minimum(v, 1.0 - 2.0**-24)))
