"""Selection by weight, without sorting everything: what top-k, nucleus and typical sampling have in common."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from oxjax.kernels.native import ffi_call
from oxjax.kernels.numerics import Numerics

_GIVEN, _ONES, _SHARES = 0, 1, 2  # kinds of masses; only given ones are read


def keep_top_k(x: Float[Array, " n"], count: Float[Array, ""], *, numerics: Numerics) -> Float[Array, " n"]:
    """The `count` largest logits, lower places first among equals; elsewhere -inf."""
    return _keep(x, x, x, count, _ONES, numerics)


def keep_top_p(x: Float[Array, " n"], share: Float[Array, ""], *, numerics: Numerics) -> Float[Array, " n"]:
    """The largest logits, lower places first among equals, until they hold a share of the softmax; elsewhere -inf."""
    return _keep(x, x, x, share, _SHARES, numerics)


def keep_top_mass(
    x: Float[Array, " n"],
    keys: Float[Array, " n"],
    mass: Float[Array, " n"],
    wanted: Float[Array, ""],
    *,
    numerics: Numerics,
) -> Float[Array, " n"]:
    """`x` where keys are the largest, lower places first among equals, until they hold a mass; elsewhere -inf.

    One stays as long as the mass of all before it is below `wanted`. Those with a key of -inf never do.

    Args:
        x: float32.
        keys: float32, not NaN.
        mass: float32, not negative.
        wanted: more than 0.
        numerics: only the backend matters.
    """
    return _keep(x, keys, mass, wanted, _GIVEN, numerics)


def _keep(x: Array, keys: Array, mass: Array, wanted: Array, kind: int, numerics: Numerics) -> Array:
    if numerics.native:
        call = ffi_call("keep_largest", jax.ShapeDtypeStruct(x.shape, x.dtype), vmap_method="sequential")
        return call(x, keys, mass, wanted, kind=kind)
    if kind == _ONES:
        mass = jnp.ones_like(x)
    elif kind == _SHARES:
        mass = jnp.exp(x - jnp.max(x))
        wanted = wanted * jnp.sum(mass)
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
