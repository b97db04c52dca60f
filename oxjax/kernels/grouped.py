"""Products that are grouped by expert: rows that chose the same one go through its matrix together."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from oxjax.kernels.dot import ROW_TILE, dot
from oxjax.kernels.loops import bounded_loop
from oxjax.kernels.native import ffi_call
from oxjax.kernels.numerics import Numerics
from oxjax.kernels.quantized import QuantizedTensor, dequantize, format_fields

Matrices = Float[Array, "n_experts d_in _"] | QuantizedTensor  # the latter's data leads with the expert


def grouped_matmul(
    x: Float[Array, "rows n d_in"], chosen: Int[Array, "rows n_used"], *weights: Matrices, numerics: Numerics
) -> tuple[Float[Array, "rows n_used _"], ...]:
    """Rows times the matrices of the experts they chose, in float32.

    Experts that nobody chose are not read.

    Args:
        x: what each of a row's experts reads, or (n = 1) what all of them do.
        chosen: experts of each row. The number after the last one stands for none, which reads nothing and gives zeros.
        weights: several share the work of grouping; all are float or all quantised. What quantised ones do to
            activations is said in `quantized_matmul`.
        numerics: see `Numerics`.
    """
    if not numerics.native:
        return _by_loops(x, chosen, weights, numerics)
    packed = [w for w in weights if isinstance(w, QuantizedTensor)]
    assert len(packed) in (0, len(weights))
    formats = np.array([n for w in packed for n in format_fields(w.format)], np.int64)
    rounds = bool(packed) and numerics.activations == "int8"
    results = [jax.ShapeDtypeStruct((*chosen.shape, _shape(w)[1]), jnp.float32) for w in weights]
    call = ffi_call("grouped_matmul", results)
    data = (w.data if isinstance(w, QuantizedTensor) else w for w in weights)
    return tuple(
        call(x.astype(jnp.float32), chosen, *data, n_experts=_n_experts(weights), formats=formats, rounds=rounds)
    )


def _n_experts(weights: tuple[Matrices, ...]) -> int:
    return jax.tree.leaves(weights)[0].shape[0]


def _shape(w: Matrices) -> tuple[int, ...]:
    return w.shape[-2:]


def _by_loops(x: Array, chosen: Array, weights: tuple[Matrices, ...], numerics: Numerics) -> tuple[Array, ...]:
    """Experts that somebody chose one after another, each over tiles of one fixed number of rows."""
    n_experts, n_pairs = _n_experts(weights), chosen.size
    # With no more pairs than experts a tile has about one row; of many rows, tiles of 16 were as fast as any.
    tile = 1 if not numerics.exact and n_pairs <= n_experts else ROW_TILE
    plain = dataclasses.replace(numerics, exact=False)  # tiles of one shape are exact by themselves
    rows, pairs_per_row = x.reshape(-1, x.shape[2]), chosen.shape[1] // x.shape[1]
    order = jnp.argsort(chosen.ravel(), stable=True).astype(jnp.int32)
    bounds = jnp.searchsorted(chosen.ravel()[order], jnp.arange(n_experts + 1)).astype(jnp.int32)
    some = bounds[1:] > bounds[:-1]
    experts_read = jnp.nonzero(some, size=n_experts, fill_value=0)[0].astype(jnp.int32)

    def one_expert(i: Array, outs: tuple[Array, ...]) -> tuple[Array, ...]:
        expert = experts_read[i]
        start, stop = bounds[expert], bounds[expert + 1]
        own = (jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, expert, keepdims=False), w) for w in weights)
        matrices = tuple(dequantize(w) if isinstance(w, QuantizedTensor) else w for w in own)

        def one_tile(j: Array, outs: tuple[Array, ...]) -> tuple[Array, ...]:
            places = start + j * tile + jnp.arange(tile, dtype=jnp.int32)
            pairs = order[jnp.minimum(places, n_pairs - 1)]
            taken = lax.optimization_barrier(rows[pairs // pairs_per_row])
            given = lax.optimization_barrier(dot(taken, *matrices, numerics=plain))
            at = jnp.where(places < stop, pairs, n_pairs)  # past the end: a row that is thrown away
            return tuple(out.at[at].set(y) for out, y in zip(outs, given, strict=True))

        return bounded_loop(0, (stop - start + tile - 1) // tile, -(-n_pairs // tile), one_tile, outs)

    empty = tuple(jnp.zeros((n_pairs + 1, _shape(w)[1]), jnp.float32) for w in weights)
    outs = bounded_loop(0, jnp.sum(some, dtype=jnp.int32), n_experts, one_expert, empty)
    return tuple(out[:n_pairs].reshape(*chosen.shape, -1) for out in outs)
