"""Rotations of pairs of numbers, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oxjax.kernels.native import ffi_call
from oxjax.kernels.numerics import Numerics


def rotate(
    x: Float[Array, "rows heads d"],
    cos: Float[Array, "rows half"],
    sin: Float[Array, "rows half"],
    *,
    adjacent: bool,
    numerics: Numerics,
) -> Float[Array, "rows heads d"]:
    """Turn pair i of every head, (x[i], x[i + half]), by the angle i of its row; what lies past the pairs stays.

    Args:
        x: of any float dtype, which the result has too.
        cos: of the angles, float32.
        sin: likewise.
        adjacent: pairs are (x[2i], x[2i + 1]).
        numerics: only the backend matters.
    """
    half = cos.shape[1]
    if numerics.native:
        call = ffi_call("rotate", jax.ShapeDtypeStruct(x.shape, jnp.float32))
        return call(x.astype(jnp.float32), cos, sin, adjacent=adjacent).astype(x.dtype)
    turned, rest = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if adjacent else jnp.split(turned, 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = a * cos - b * sin, a * sin + b * cos
    if adjacent:
        turned = jnp.stack([first, second], axis=-1).reshape(turned.shape)
    else:
        turned = jnp.concatenate([first, second], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)
