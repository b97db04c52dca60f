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
from oxjax.kernels.numerics import Numerics

# Rows of a chunk, powers of two; the work inside of a chunk grows with its square. On two CPU cores 512 rows of gated
# DeltaNet (16 heads of 128 by 128) take 104 ms one by one, 20 ms in chunks of 16 and 32 ms in chunks of 64. Elsewhere
# every operation costs the start of a kernel, so fewer and larger ones win.
CPU_CHUNK, ACCELERATOR_CHUNK = 16, 64
MIN_CHUNK = 16  # fewer rows at the end of a sequence go one by one

NATIVE, ROWS = "native", "rows"
ScanMethod = str | int  # `NATIVE`, `ROWS`, or the rows of a chunk

# (state, a row's inputs ...) -> (new state, the row's output); the same with the rows of a chunk stacked.
Step = Callable[..., tuple[Array, Array]]


def scan_method(numerics: Numerics, *, has_kernel: bool = True) -> ScanMethod:
    """The way to run a recurrence: native kernel, row by row, or chunks, which only fast mode may use.

    Args:
        numerics: exact ones go row by row.
        has_kernel: `linear_scan` computes this recurrence; others go row by row on CPUs, where that is faster.
    """
    on_cpu = jax.default_backend() == "cpu"
    if numerics.native and has_kernel:
        return NATIVE
    if numerics.exact or (on_cpu and not has_kernel):
        return ROWS
    return CPU_CHUNK if on_cpu else ACCELERATOR_CHUNK


def recurrence(
    step: Step,
    chunk: Step,
    initial: Float[Array, "S ..."],
    rows: tuple[Float[Array, "T ..."], ...],
    layout: RowLayout,
    *,
    method: ScanMethod,
) -> tuple[Float[Array, "T ..."], Float[Array, "S ..."]]:
    """Run each sequence's rows, one sequence after the other, so that only rows that exist cost anything.

    Args:
        step: one row.
        chunk: rows of a chunk at once. Rows of zeros must leave the state as it is: they fill the last chunk up.
        initial: state of each sequence before its rows.
        rows: inputs of the recurrence, several arrays with one entry per row.
        layout: which rows belong to which sequence.
        method: `ROWS` or the rows of a chunk.

    Returns:
        the output of every row, finite for padding, and the state after each sequence's rows.
    """
    n_rows = rows[0].shape[0]
    size = method if isinstance(method, int) and n_rows >= MIN_CHUNK else 0
    output = jax.eval_shape(step, initial[0], *(a[0] for a in rows))[1]
    empty = jnp.zeros((n_rows + size, *output.shape), output.dtype)
    if size:
        padded = tuple(jnp.pad(a, ((0, size), *((0, 0),) * (a.ndim - 1))) for a in rows)

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
        if size:

            def one_chunk(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                state, out = carry
                first = start + index * size
                here = first + jnp.arange(size, dtype=jnp.int32) < end
                cut = (lax.dynamic_slice_in_dim(a, first, size) for a in padded)
                state, y = chunk(state, *(jnp.where(here.reshape(-1, *(1,) * (a.ndim - 1)), a, 0.0) for a in cut))
                # Outputs past the sequence's end lie where later sequences write theirs.
                return state, lax.dynamic_update_slice_in_dim(out, y, first, 0)

            n_chunks = (end - start + size - MIN_CHUNK) // size
            state, out = lax.fori_loop(0, n_chunks, one_chunk, (state, out))
            start = start + n_chunks * size
        state, out = lax.fori_loop(start, end, one_row, (state, out))
        return lax.dynamic_update_index_in_dim(states, state, seq, 0), out

    states, out = lax.fori_loop(0, initial.shape[0], one_sequence, (initial, empty))
    return out[:n_rows], states
