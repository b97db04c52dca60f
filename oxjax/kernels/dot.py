"""Matrix products and row sums whose bits, when asked, do not depend on how many rows there are.

XLA:CPU picks another summation order when the number of rows changes, and another exponential where one follows a
maximum over 4,096 numbers or more. Native kernels do not. The exact form of the XLA backend cuts its work into
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

from oxjax.kernels.native import ffi_call
from oxjax.kernels.numerics import Numerics

PART = 2048  # outputs whose weights are float32 at a time, where they are held in another form
ROW_TILE = 16  # 16 rows cost one decode row 2x and 512 rows 1.4x of the plain product; 8 and 32 are worse at one end
FEW_ROWS = 4


def min_rows(numerics: Numerics) -> int:
    """Smallest number of rows that a program should have.

    For one row, and with a handful of experts for two, XLA compiles other operations, which round differently; so
    exact programs have at least `FEW_ROWS`, or a whole row tile where XLA computes the products.
    """
    if not numerics.exact:
        return 1
    return FEW_ROWS if numerics.native else ROW_TILE


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
    x: Float[Array, "rows d_in"], *weights: Float[Array, "_ _"], numerics: Numerics, contract: int = 0
) -> tuple[Float[Array, "rows _"], ...]:
    """`x @ w` for each weight `[d_in, d_out]` (or `[d_out, d_in]` with `contract=1`), in float32.

    Args:
        x: activations.
        weights: several share one pass over the row tiles. Of what has another dtype than x, no more than a part is in
            float32 at any time.
        numerics: see `Numerics`; activations play no part.
        contract: which axis of the weights is `d_in`.
    """
    mixed = any(w.dtype != x.dtype for w in weights)
    if numerics.native and (numerics.exact or mixed):
        results = [jax.ShapeDtypeStruct((x.shape[0], w.shape[1 - contract]), jnp.float32) for w in weights]
        call = ffi_call("float_matmul", results)
        return tuple(call(x.astype(jnp.float32), *weights, transposed=contract == 1))

    if mixed:
        return tuple(_mixed(x, w, contract, numerics=numerics) for w in weights)

    def products(tile: Array) -> tuple[Array, ...]:
        return tuple(_product(tile, w, contract) for w in weights)

    return by_tiles(products, x) if numerics.exact else products(x)


def _mixed(x: Array, weight: Array, contract: int, *, numerics: Numerics) -> Array:
    def part(start: Array | int, n: int) -> Array:
        # The barrier keeps XLA from converting the whole matrix before the loop over its parts.
        whole, first = lax.optimization_barrier((weight, start))
        return lax.dynamic_slice_in_dim(whole, first, n, 1 - contract).astype(jnp.float32)

    return dot_by_parts(x, part, weight.shape[1 - contract], numerics=numerics, contract=contract)


def dot_by_parts(
    x: Float[Array, "rows d_in"],
    part: Callable[[Array | int, int], Float[Array, "_ _"]],
    d_out: int,
    *,
    numerics: Numerics,
    contract: int = 0,
) -> Float[Array, "rows d_out"]:
    """The product with a matrix of which `PART` outputs at a time are made and thrown away.

    Args:
        x: activations.
        part: gives the float32 weights of outputs from a multiple of `PART` on, so many.
        d_out: outputs in all.
        numerics: see `dot`.
        contract: see `dot`.
    """
    n_parts, rest = divmod(d_out, PART)

    def product(start: Array | int, n: int) -> Array:
        return dot(x.astype(jnp.float32), part(start, n), numerics=numerics, contract=contract)[0]

    found = []
    if n_parts:
        by_part = lax.map(lambda i: product(i * PART, PART), jnp.arange(n_parts))
        found.append(by_part.swapaxes(0, 1).reshape(x.shape[0], n_parts * PART))
    if rest:
        found.append(product(n_parts * PART, rest))
    return jnp.concatenate(found, axis=1)


def dot_heads(
    x: Float[Array, "rows heads d_in"], weight: Float[Array, "heads d_in d_out"], *, numerics: Numerics
) -> Float[Array, "rows heads d_out"]:
    """Each head's part of a row times that head's matrix, in float32; dtypes and numerics as in `dot`."""
    if numerics.exact and numerics.native:
        call = ffi_call("dot_heads", jax.ShapeDtypeStruct((*x.shape[:2], weight.shape[2]), jnp.float32))
        return call(x.astype(jnp.float32), weight)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def product(tile: Array) -> Array:
        dims = (((2,), (1,)), ((0,), (0,)))
        by_head = tile.swapaxes(0, 1)
        y = lax.dot_general(by_head, weight, dims, precision=precision, preferred_element_type=jnp.float32)
        return y.swapaxes(0, 1)

    return by_tiles(product, x) if numerics.exact else product(x)


def row_sum(x: Float[Array, "rows d"], *, numerics: Numerics) -> Float[Array, "rows 1"]:
    """Sum of each float32 row; if exact, the XLA backend computes it as a product with ones."""
    if not numerics.exact:
        return jnp.sum(x, axis=-1, keepdims=True)
    if numerics.native:
        return ffi_call("row_sum", jax.ShapeDtypeStruct((x.shape[0], 1), jnp.float32))(x)
    return dot(x, jnp.ones((x.shape[1], 1), x.dtype), numerics=numerics)[0]


def softmax(x: Float[Array, "rows d"], *, numerics: Numerics) -> Float[Array, "rows d"]:
    """Softmax of each float32 row."""
    return by_tiles(jax.nn.softmax, x) if numerics.exact else jax.nn.softmax(x)
