"""Running a recurrence over flat rows of several sequences: row by row, or in chunks of rows.

Row by row every row meets the same operations on arrays of the same shape, whatever else the step holds, so
its bits depend on nothing but its sequence. Chunks turn most of the work into matrix products; their result
is the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from oxjax.batch import RowLayout
from oxjax.kernels.loops import hoist
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
    size = method if isinstance(method, int) and rows[0].shape[0] >= MIN_CHUNK else 0
    step, step_consts = hoist(step, initial[0], *(a[0] for a in rows))
    chunk_consts: list[Any] = []
    if size:
        one_chunk = (jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype) for a in rows)
        chunk, chunk_consts = hoist(chunk, initial[0], *one_chunk)
    places = layout.starts, layout.ends, layout.row_seq, layout.is_real
    return _run(step, chunk, size, initial, rows, places, step_consts, chunk_consts)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _run(
    step: Step,
    chunk: Step,
    size: int,
    initial: Array,
    rows: tuple[Array, ...],
    places: tuple[Array, ...],
    step_consts: list[Any],
    chunk_consts: list[Any],
) -> tuple[Array, Array]:
    """`recurrence`, in chunks of `size` rows or, for 0, row by row; `places` are those of the `RowLayout`."""
    starts, ends, *_ = places
    n_rows = rows[0].shape[0]
    output = jax.eval_shape(step, initial[0], *(a[0] for a in rows), step_consts)[1]
    empty = jnp.zeros((n_rows + size, *output.shape), output.dtype)
    padded = tuple(jnp.pad(a, ((0, size), *((0, 0),) * (a.ndim - 1))) for a in rows) if size else rows

    def one_row(row: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        state, out = carry
        inputs = tuple(lax.dynamic_index_in_dim(a, row, keepdims=False) for a in rows)
        # The barriers keep the step's own code the same in every program.
        state, y = lax.optimization_barrier(step(*lax.optimization_barrier((state, *inputs)), step_consts))
        return state, lax.dynamic_update_index_in_dim(out, y, row, 0)

    def one_sequence(seq: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        states, out = carry
        start, end = starts[seq], ends[seq]
        state = lax.dynamic_index_in_dim(states, seq, keepdims=False)
        if size:

            def one_chunk(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                state, out = carry
                first = start + index * size
                here = first + jnp.arange(size, dtype=jnp.int32) < end
                cut = (lax.dynamic_slice_in_dim(a, first, size) for a in padded)
                cut = (jnp.where(here.reshape(-1, *(1,) * (a.ndim - 1)), a, 0.0) for a in cut)
                state, y = chunk(state, *cut, chunk_consts)
                # Outputs past the sequence's end lie where later sequences write theirs.
                return state, lax.dynamic_update_slice_in_dim(out, y, first, 0)

            n_chunks = (end - start + size - MIN_CHUNK) // size
            state, out = lax.fori_loop(0, n_chunks, one_chunk, (state, out))
            start = start + n_chunks * size
        state, out = lax.fori_loop(start, end, one_row, (state, out))
        return lax.dynamic_update_index_in_dim(states, state, seq, 0), out

    states, out = lax.fori_loop(0, initial.shape[0], one_sequence, (initial, empty))
    return out[:n_rows], states


@_run.defjvp
def _run_jvp(
    step: Step, chunk: Step, size: int, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Derivatives row by row: reverse mode needs one loop with a static number of trips."""

    def by_rows(
        initial: Array, rows: tuple[Array, ...], places: tuple[Array, ...], step_consts: list[Any], _: list[Any]
    ) -> tuple[Array, Array]:
        row_seq, is_real = places[2:]

        def one_row(states: Array, row: tuple[Any, ...]) -> tuple[Array, Array]:
            seq, is_real, inputs = row
            state, y = step(lax.dynamic_index_in_dim(states, seq, keepdims=False), *inputs, step_consts)
            updated = lax.dynamic_update_index_in_dim(states, state, seq, 0)
            return jnp.where(is_real, updated, states), jnp.where(is_real, y, 0.0)

        states, out = lax.scan(one_row, initial, (row_seq, is_real, rows))
        return out, states

    return jax.jvp(by_rows, primals, tangents)
