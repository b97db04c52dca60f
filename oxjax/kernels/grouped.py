"""Work that is grouped by expert: rows that chose the same one go through its matrices together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from oxjax.kernels.dot import ROW_TILE


def grouped(
    fn: Callable[[Array, Array, Any], Array],
    x: Float[Array, "rows d"],
    chosen: Int[Array, "rows n_used"],
    weights: Float[Array, "rows n_used"],
    experts: Any,
    *,
    exact: bool,
    is_real: Bool[Array, " rows"] | None = None,
) -> Float[Array, "rows d"]:
    """Sum over each row's experts of `fn(row, weight, expert)`, in the order of their numbers.

    Pairs of row and expert are sorted by expert, and experts that somebody chose run one after another, each over
    tiles of one fixed number of rows. Experts that nobody chose are not read. What a row gets does not depend on
    the other rows of its tile, for the reasons given in `kernels.dot`.

    Args:
        fn: of a tile `[tile, d]`, its weights `[tile, 1]` and one expert's part of `experts`; gives float32 rows.
        x: rows.
        chosen: different experts of each row.
        weights: passed on to `fn`.
        experts: a pytree of arrays that lead with the expert.
        exact: the bits of a row do not depend on the number of rows nor on the other rows.
        is_real: rows that count; the others read nothing and get zero.
    """
    (rows, n_used), n_experts = chosen.shape, jax.tree.leaves(experts)[0].shape[0]
    # With no more pairs than experts a tile has about one row; of many rows, tiles of 16 were as fast as any.
    tile = 1 if not exact and rows * n_used <= n_experts else ROW_TILE
    asked = (chosen if is_real is None else jnp.where(is_real[:, None], chosen, n_experts)).ravel()
    order = jnp.argsort(asked, stable=True).astype(jnp.int32)
    bounds = jnp.searchsorted(asked[order], jnp.arange(n_experts + 1)).astype(jnp.int32)
    some = bounds[1:] > bounds[:-1]
    experts_read = jnp.nonzero(some, size=n_experts, fill_value=0)[0].astype(jnp.int32)

    def one_expert(i: Array, total: Array) -> Array:
        expert = experts_read[i]
        start, stop = bounds[expert], bounds[expert + 1]
        one = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, expert, keepdims=False), experts)

        def one_tile(j: Array, total: Array) -> Array:
            places = start + j * tile + jnp.arange(tile, dtype=jnp.int32)
            pairs = order[jnp.minimum(places, rows * n_used - 1)]
            at = jnp.where(places < stop, pairs // n_used, rows)  # past the end: a row that is thrown away
            taken = lax.optimization_barrier(x[jnp.minimum(at, rows - 1)])
            given = lax.optimization_barrier(fn(taken, weights.ravel()[pairs][:, None], one))
            return total.at[at].add(given)

        return lax.fori_loop(0, (stop - start + tile - 1) // tile, one_tile, total)

    total = jnp.zeros((rows + 1, x.shape[1]), jnp.float32)
    return lax.fori_loop(0, jnp.sum(some, dtype=jnp.int32), one_expert, total)[:rows]
