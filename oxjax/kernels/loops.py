"""Loops whose number of trips is data, and that can be differentiated all the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import eval_jaxpr
from jaxtyping import Array, Int

Body = Callable[..., Any]  # (index, carry) -> carry


def bounded_loop(
    lower: Int[Array, ""] | int, upper: Int[Array, ""] | int, max_trips: int, body: Body, init: Any
) -> Any:
    """`lax.fori_loop` over indices that are known to be at most `max_trips`, in forward and reverse mode.

    Reverse mode needs a static number of trips. The loop itself keeps its bounds; only derivatives take `max_trips`
    trips and skip those past the upper bound.

    Args:
        lower, upper: the first index, and the one after the last.
        max_trips: a static bound of their difference.
        body: may close over arrays, for which there are derivatives too.
        init: the first carry.
    """
    lower, upper = jnp.int32(lower), jnp.int32(upper)
    converted, consts = hoist(body, lower, init)
    return _loop(converted, max_trips, lower, upper, init, consts)


def hoist(fn: Callable[..., Any], *example: Any) -> tuple[Callable[..., Any], list[Any]]:
    """A function with the arrays that `fn` closes over as further arguments, and these arrays.

    A rule for derivatives sees arguments only. (`jax.closure_convert` leaves integers behind, which a rule that runs
    under another trace may not use.)

    Args:
        fn: pure.
        example: its arguments, or their shapes and dtypes.
    """
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*example)
    tree = jax.tree.structure(shape)

    def converted(*arguments: Any) -> Any:
        *own, consts = arguments
        return tree.unflatten(eval_jaxpr(closed.jaxpr, consts, *jax.tree.leaves(own)))

    return converted, closed.consts


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _loop(body: Body, max_trips: int, lower: Array, upper: Array, init: Any, consts: list[Any]) -> Any:
    return lax.fori_loop(lower, upper, lambda i, carry: body(i, carry, consts), init)


@_loop.defjvp
def _loop_jvp(body: Body, max_trips: int, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    def skipping(lower: Array, upper: Array, init: Any, consts: list[Any]) -> Any:
        def trip(carry: Any, i: Array) -> tuple[Any, None]:
            return lax.cond(i < upper, lambda: body(i, carry, consts), lambda: carry), None

        return lax.scan(trip, init, lower + jnp.arange(max_trips, dtype=jnp.int32))[0]

    return jax.jvp(skipping, primals, tangents)
