"""Matrix products and row sums whose bits, when asked, do not depend on how many rows there are.

XLA:CPU picks another summation order when the number of rows changes, and another exponential where one follows a
maximum over 4,096 numbers or more. Native kernels do not. Where there are none, the `exact` form cuts its work into
tiles of `ROW_TILE` rows, one shape for all callers, with a barrier that keeps the compiler from merging a tile with
what surrounds it. The result of a row is then a function of that row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from oxjax.kernels import native

PART = 2048  # outputs whose weights are float32 at a time, where they are held in another form
ROW_TILE = 16  # 16 rows cost one decode row 2x and 512 rows 1.4x of the plain product; 8 and 32 are worse at one end
FEW_ROWS = 4


def least_rows(*, exact: bool) -> int:
    """Rows that a program should have at least.

    Of one row, and with a handful of experts of two, the compiler makes other operations than of more, which round at
    other places; so exact programs have `FEW_ROWS`. Without native kernels they have a row tile, as products do.
    """
    return (FEW_ROWS if native.kernels() else ROW_TILE) if exact else 1


def by_tiles(fn: Callable[[Array], Any], x: Float[Array, "rows ..."]) -> Any:
    """`fn` of every tile of rows, which gives an array or several with a row for each."""
    rows = x.shape[0]
    padded = jnp.pad(x, ((0, -rows % ROW_TILE), *((0, 0),) * (x.ndim - 1)))
    tiles = padded.reshape(-1, ROW_TILE, *x.shape[1:])
    given = lax.map(lambda tile: lax.optimization_barrier(fn(lax.optimization_barrier(tile))), tiles)
    return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:rows], given)


def _product(x: Array, weight: Array, contract: int) -> Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((x.ndim - 1,), (contract,)), ((), ()))
    return lax.dot_general(x, weight, dims, precision=precision, preferred_element_type=jnp.float32)


def dot(
    x: Float[Array, "rows d_in"], *weights: Float[Array, "_ _"], exact: bool, contract: int = 0
) -> tuple[Float[Array, "rows _"], ...]:
    """`x @ w` for each weight `[d_in, d_out]` (or `[d_out, d_in]` with `contract=1`), in float32.

    Args:
        x: activations.
        weights: several share one pass over the row tiles. Of what has another dtype than x, no more than a part is in
            float32 at any time.
        exact: the bits of a row do not depend on the number of rows nor on the other rows.
        contract: which axis of the weights is `d_in`.
    """
    mixed = any(w.dtype != x.dtype for w in weights)
    if native.kernels() and (exact or mixed):
        results = [jax.ShapeDtypeStruct((x.shape[0], w.shape[1 - contract]), jnp.float32) for w in weights]
        call = jax.ffi.ffi_call("oxjax_float_matmul", results)
        return tuple(call(x.astype(jnp.float32), *weights, transposed=contract == 1))

    if mixed:
        return tuple(_mixed(x, w, contract, exact=exact) for w in weights)

    def products(tile: Array) -> tuple[Array, ...]:
        return tuple(_product(tile, w, contract) for w in weights)

    return by_tiles(products, x) if exact else products(x)


def _mixed(x: Array, weight: Array, contract: int, *, exact: bool) -> Array:
    def part(start: Array | int, n: int) -> Array:
        # The barrier keeps XLA from converting the whole matrix before the loop over its parts.
        whole, first = lax.optimization_barrier((weight, start))
        return lax.dynamic_slice_in_dim(whole, first, n, 1 - contract).astype(jnp.float32)

    return dot_by_parts(x, part, weight.shape[1 - contract], exact=exact, contract=contract)


def dot_by_parts(
    x: Float[Array, "rows d_in"],
    part: Callable[[Array | int, int], Float[Array, "_ _"]],
    d_out: int,
    *,
    exact: bool,
    contract: int = 0,
) -> Float[Array, "rows d_out"]:
    """The product with a matrix of which `PART` outputs at a time are made and thrown away.

    Args:
        x: activations.
        part: gives the float32 weights of outputs from a multiple of `PART` on, so many.
        d_out: outputs in all.
        exact: see `dot`.
        contract: see `dot`.
    """
    n_parts, rest = divmod(d_out, PART)

    def product(start: Array | int, n: int) -> Array:
        return dot(x.astype(jnp.float32), part(start, n), exact=exact, contract=contract)[0]

    found = []
    if n_parts:
        by_part = lax.map(lambda i: product(i * PART, PART), jnp.arange(n_parts))
        found.append(by_part.swapaxes(0, 1).reshape(x.shape[0], n_parts * PART))
    if rest:
        found.append(product(n_parts * PART, rest))
    return jnp.concatenate(found, axis=1)


def dot_heads(
    x: Float[Array, "rows heads d_in"], weight: Float[Array, "heads d_in d_out"], *, exact: bool
) -> Float[Array, "rows heads d_out"]:
    """Each head's part of a row times that head's matrix, in float32; dtypes and `exact` as in `dot`."""
    if exact and native.kernels():
        call = jax.ffi.ffi_call("oxjax_dot_heads", jax.ShapeDtypeStruct((*x.shape[:2], weight.shape[2]), jnp.float32))
        return call(x.astype(jnp.float32), weight)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def product(tile: Array) -> Array:
        dims = (((2,), (1,)), ((0,), (0,)))
        by_head = tile.swapaxes(0, 1)
        y = lax.dot_general(by_head, weight, dims, precision=precision, preferred_element_type=jnp.float32)
        return y.swapaxes(0, 1)

    return by_tiles(product, x) if exact else product(x)


def row_sum(x: Float[Array, "rows d"], *, exact: bool) -> Float[Array, "rows 1"]:
    """Sum of each float32 row; `exact` as in `dot`, there as a product with ones where there is no kernel."""
    if not exact:
        return jnp.sum(x, axis=-1, keepdims=True)
    if native.kernels():
        return jax.ffi.ffi_call("oxjax_row_sum", jax.ShapeDtypeStruct((x.shape[0], 1), jnp.float32))(x)
    return dot(x, jnp.ones((x.shape[1], 1), x.dtype), exact=True)[0]


def softmax(x: Float[Array, "rows d"], *, exact: bool) -> Float[Array, "rows d"]:
    """Softmax of each float32 row."""
    return by_tiles(jax.nn.softmax, x) if exact else jax.nn.softmax(x)
