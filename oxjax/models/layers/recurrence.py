"""Running a recurrence over flat rows of several sequences: row by row, or in chunks of rows.

Row by row every row meets the same operations on arrays of the same shape, whatever else the step holds, so
its bits depend on nothing but its sequence. Chunks turn most of the work into matrix products; their result
is the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from oxjax.batch import RowLayout, cut_tiles

MAX_CHUNK = 64  # rows of a chunk; the work inside of one grows with its square
MIN_CHUNK = 16  # below, chunks would be mostly empty

# (state, a row's inputs ...) -> (new state, the row's output); the same with rows stacked for a chunk.
Step = Callable[..., tuple[Array, Array]]


def recurrence(
    step: Step,
    chunk: Step,
    initial: Float[Array, "S ..."],
    rows: tuple[Float[Array, "T ..."], ...],
    layout: RowLayout,
    *,
    exact: bool,
) -> tuple[Float[Array, "T ..."], Float[Array, "S ..."]]:
    """Run each sequence's rows through a recurrence that goes on from its state.

    Args:
        step: one row.
        chunk: rows one after another. Rows of zeros must leave the state as it is: they fill chunks up.
        initial: state of each sequence before its rows.
        rows: inputs of the recurrence, several arrays with one entry per row.
        layout: which rows belong to which sequence.
        exact: row by row, so that bits do not depend on the cut.

    Returns:
        the output of every row, zero or arbitrary but finite for padding, and the state after each sequence's rows.
    """
    mean_rows = rows[0].shape[0] // initial.shape[0]
    if exact or mean_rows < MIN_CHUNK:
        return _by_row(step, initial, rows, layout)
    return _by_chunk(chunk, initial, rows, layout, min(MAX_CHUNK, 1 << (mean_rows.bit_length() - 1)))


def _by_row(step: Step, initial: Array, rows: tuple[Array, ...], layout: RowLayout) -> tuple[Array, Array]:
    """One sequence after the other, so that only rows that exist cost anything."""
    output = jax.eval_shape(step, initial[0], *(a[0] for a in rows))[1]

    def one_row(row: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        state, out = carry
        inputs = tuple(lax.dynamic_index_in_dim(a, row, keepdims=False) for a in rows)
        # The barriers keep the step's own code the same in every program.
        state, y = lax.optimization_barrier(step(*lax.optimization_barrier((state, *inputs))))
        return state, lax.dynamic_update_index_in_dim(out, y, row, 0)

    def one_sequence(seq: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        states, out = carry
        before = lax.dynamic_index_in_dim(states, seq, keepdims=False)
        after, out = lax.fori_loop(layout.starts[seq], layout.ends[seq], one_row, (before, out))
        return lax.dynamic_update_index_in_dim(states, after, seq, 0), out

    empty = jnp.zeros((rows[0].shape[0], *output.shape), output.dtype)
    states, out = lax.fori_loop(0, initial.shape[0], one_sequence, (initial, empty))
    return out, states


def _by_chunk(
    chunk: Step, initial: Array, rows: tuple[Array, ...], layout: RowLayout, size: int
) -> tuple[Array, Array]:
    tiles = cut_tiles(layout.row_seq, layout.starts, layout.ends, size)

    def one_chunk(states: Array, tile: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        seq, index, is_row = tile
        inputs = (jnp.where(is_row.reshape(-1, *(1,) * (a.ndim - 1)), a[index], 0.0) for a in rows)
        state, y = chunk(lax.dynamic_index_in_dim(states, seq, keepdims=False), *inputs)
        return lax.dynamic_update_index_in_dim(states, state, seq, 0), y

    states, out = lax.scan(one_chunk, initial, (tiles.seq, tiles.rows, tiles.filled))
    return out[tiles.row_tile, tiles.row_place], states
