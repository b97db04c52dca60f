"""Work that is grouped by expert: rows that chose the same one go through its matrices together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from oxjax.kernels.dot import ROW_TILE

FAST_TILES = 1, 32  # rows of a tile in fast mode, with few rows and with many


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

    Pairs of row and expert are sorted by expert and cut into tiles of one expert each. Tiles have one fixed number of
    rows and run one after another, as many as there are, so experts that nobody chose are not read; what a row
    gets does not depend on the other rows of its tile, for the reasons given in `kernels.dot`.

    Args:
        fn: of a tile `[tile, d]`, its weights `[tile, 1]` and one expert's part of `experts`; gives float32 `[tile, d]`.
        x: rows.
        chosen: different experts of each row.
        weights: passed on to `fn`.
        experts: a pytree of arrays that lead with the expert.
        exact: the bits of a row do not depend on the number of rows nor on the other rows.
        is_real: rows that count; the others read nothing and get zero.
    """
    (rows, n_used), n_experts = chosen.shape, jax.tree.leaves(experts)[0].shape[0]
    tile = ROW_TILE if exact else FAST_TILES[rows * n_used > 2 * n_experts]
    asked = chosen if is_real is None else jnp.where(is_real[:, None], chosen, n_experts)
    order = jnp.argsort(asked.ravel(), stable=True).astype(jnp.int32)
    bounds = jnp.searchsorted(asked.ravel()[order], jnp.arange(n_experts + 1)).astype(jnp.int32)
    tile_ends = jnp.cumsum((bounds[1:] - bounds[:-1] + tile - 1) // tile, dtype=jnp.int32)

    def one_tile(i: Array, total: Array) -> Array:
        expert = jnp.searchsorted(tile_ends, i, side="right").astype(jnp.int32)
        earlier = tile_ends[expert] - (bounds[expert + 1] - bounds[expert] + tile - 1) // tile
        places = bounds[expert] + (i - earlier) * tile + jnp.arange(tile, dtype=jnp.int32)
        pairs = order[jnp.minimum(places, rows * n_used - 1)]
        at = jnp.where(places < bounds[expert + 1], pairs // n_used, rows)  # past the end: a row that is thrown away
        weight = weights.ravel()[pairs][:, None]
        one = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, expert, keepdims=False), experts)
        taken = lax.optimization_barrier(x[jnp.minimum(at, rows - 1)])
        given = lax.optimization_barrier(fn(taken, weight, one))
        return total.at[at].add(given)

    total = jnp.zeros((rows + 1, x.shape[1]), jnp.float32)
    return lax.fori_loop(0, tile_ends[-1], one_tile, total)[:rows]
