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

from oxjax.batch import RowLayout

CHUNK = 64  # rows; the work inside of a chunk grows with its square
MIN_CHUNK = 16  # fewer rows at the end of a sequence go one by one

# (state, a row's inputs ...) -> (new state, the row's output); the same with CHUNK rows stacked.
Step = Callable[..., tuple[Array, Array]]


def product(a: Float[Array, "... n k"], b: Float[Array, "... k m"]) -> Float[Array, "... n m"]:
    """Products of float32 matrices inside of a chunk, in full precision."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def recurrence(
    step: Step,
    chunk: Step | None,
    initial: Float[Array, "S ..."],
    rows: tuple[Float[Array, "T ..."], ...],
    layout: RowLayout,
) -> tuple[Float[Array, "T ..."], Float[Array, "S ..."]]:
    """Run each sequence's rows, one sequence after the other, so that only rows that exist cost anything.

    Args:
        step: one row.
        chunk: CHUNK rows. Rows of zeros must leave the state as it is: they fill the last chunk up. None goes
            row by row, as exact mode has to.
        initial: state of each sequence before its rows.
        rows: inputs of the recurrence, several arrays with one entry per row.
        layout: which rows belong to which sequence.

    Returns:
        the output of every row, finite for padding, and the state after each sequence's rows.
    """
    n_rows = rows[0].shape[0]
    in_chunks = chunk is not None and n_rows >= MIN_CHUNK
    output = jax.eval_shape(step, initial[0], *(a[0] for a in rows))[1]
    empty = jnp.zeros((n_rows + CHUNK * in_chunks, *output.shape), output.dtype)
    if in_chunks:
        padded = tuple(jnp.pad(a, ((0, CHUNK), *((0, 0),) * (a.ndim - 1))) for a in rows)

    def one_row(row: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        state, out = carry
        inputs = tuple(lax.dynamic_index_in_dim(a, row, keepdims=False) for a in rows)
        # The barriers keep the step's own code the same in every program.
        state, y = lax.optimization_barrier(step(*lax.optimization_barrier((state, *inputs))))
        return state, lax.dynamic_update_index_in_dim(out, y, row, 0)

    def one_sequence(seq: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        states, out = carry
        start, end = layout.starts[seq], layout.ends[seq]
        state = lax.dynamic_index_in_dim(states, seq, keepdims=False)
        if in_chunks:

            def one_chunk(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                state, out = carry
                first = start + index * CHUNK
                here = first + jnp.arange(CHUNK, dtype=jnp.int32) < end
                cut = (lax.dynamic_slice_in_dim(a, first, CHUNK) for a in padded)
                state, y = chunk(state, *(jnp.where(here.reshape(-1, *(1,) * (a.ndim - 1)), a, 0.0) for a in cut))
                # Outputs past the sequence's end lie where later sequences write theirs.
                return state, lax.dynamic_update_slice_in_dim(out, y, first, 0)

            n_chunks = (end - start + CHUNK - MIN_CHUNK) // CHUNK
            state, out = lax.fori_loop(0, n_chunks, one_chunk, (state, out))
            start = start + n_chunks * CHUNK
        state, out = lax.fori_loop(start, end, one_row, (state, out))
        return lax.dynamic_update_index_in_dim(states, state, seq, 0), out

    states, out = lax.fori_loop(0, initial.shape[0], one_sequence, (initial, empty))
    return out[:n_rows], states
