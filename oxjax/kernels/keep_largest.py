"""Selection by weight, without sorting: what top-k, nucleus and typical sampling have in common."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from oxjax.kernels import native


def keep_largest(
    x: Float[Array, " n"], keys: Float[Array, " n"], mass: Float[Array, " n"], wanted: Float[Array, ""]
) -> Float[Array, " n"]:
    """`x` where keys are the largest, lower places first among equals, until they hold a mass; elsewhere -inf.

    One stays as long as the mass of all before it is below `wanted`. Those with a key of -inf never do.

    Args:
        x: float32.
        keys: float32, not NaN.
        mass: float32, not negative.
        wanted: more than 0.
    """
    if native.kernels():
        kind = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.ffi.ffi_call("oxjax_keep_largest", kind, vmap_method="sequential")(x, keys, mass, wanted)
    bits = lax.bitcast_convert_type(keys + 0.0, jnp.uint32)
    ranks = jnp.where(keys < 0.0, ~bits, bits | jnp.uint32(1 << 31))  # in the order of the keys
    mass = jnp.where(keys > -jnp.inf, mass, 0.0)

    def halve(bit: Array, bound: Array) -> Array:
        higher = bound | jnp.uint32(1 << 31) >> bit.astype(jnp.uint32)
        return jnp.where(jnp.sum(jnp.where(ranks >= higher, mass, 0.0)) >= wanted, higher, bound)

    bound = lax.fori_loop(0, 32, halve, jnp.uint32(0))  # the last that all from it on still hold enough
    equals = ranks == bound
    before = jnp.sum(jnp.where(ranks > bound, mass, 0.0)) + jnp.cumsum(jnp.where(equals, mass, 0.0))
    stays = (ranks > bound) | (equals & (before - mass < wanted))
    return jnp.where(stays & (keys > -jnp.inf), x, -jnp.inf)
