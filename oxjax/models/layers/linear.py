"""Affine maps: the only place that knows how a weight matrix is held."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from oxjax.kernels.dot import dot
from oxjax.kernels.numerics import Numerics
from oxjax.kernels.quantized import QuantizedTensor, columns, quantized_matmul


@struct.dataclass
class Linear:
    """`y = x @ weight + bias`: the weight `[d_in, d_out]`, of any float dtype or quantised; the bias float32."""

    weight: Float[Array, "d_in d_out"] | QuantizedTensor
    bias: Float[Array, " d_out"] | None = None


def linear(
    p: Linear, x: Float[Array, "rows d_in"], numerics: Numerics, dtype: DTypeLike | None = None
) -> Float[Array, "rows d_out"]:
    """Apply an affine map to rows; see `linears`."""
    return linears((p,), x, numerics, dtype)[0]


def linears(
    layers: Sequence[Linear], x: Float[Array, "rows d_in"], numerics: Numerics, dtype: DTypeLike | None = None
) -> tuple[Float[Array, "rows _"], ...]:
    """Apply several affine maps to the same rows, which native kernels read and quantise once.

    Args:
        layers: all have the input width of x.
        x: activations.
        numerics: see `Numerics`.
        dtype: of the results; x's unless given. Products and biases add up in float32 before.
    """
    products = _products(x, [p.weight for p in layers], numerics)
    biased = (y if p.bias is None else y + p.bias for p, y in zip(layers, products, strict=True))
    return tuple(y.astype(x.dtype if dtype is None else dtype) for y in biased)


def _products(x: Array, weights: list[Array | QuantizedTensor], numerics: Numerics) -> list[Array]:
    """`x @ w` for each, those of a kind together."""
    packed = [w for w in weights if isinstance(w, QuantizedTensor)]
    plain = [w for w in weights if not isinstance(w, QuantizedTensor)]
    of_packed = iter(quantized_matmul(x.astype(jnp.float32), *packed, numerics=numerics) if packed else ())
    of_plain = iter(dot(x, *plain, numerics=numerics) if plain else ())
    return [next(of_packed if isinstance(w, QuantizedTensor) else of_plain) for w in weights]


def lookup(
    table: Float[Array, "n d"] | QuantizedTensor, ids: Int[Array, " rows"], dtype: DTypeLike
) -> Float[Array, "rows d"]:
    """Rows of an embedding table; a quantised one is `[d, n]`, and no more than the rows is dequantised."""
    return (columns(table, ids) if isinstance(table, QuantizedTensor) else table[ids]).astype(dtype)


def tied_logits(
    table: Float[Array, "n d"] | QuantizedTensor, x: Float[Array, "rows d"], numerics: Numerics
) -> Float[Array, "rows n"]:
    """Products with every row of an embedding table, in float32."""
    if isinstance(table, QuantizedTensor):
        return linear(Linear(weight=table), x, numerics, jnp.float32)
    return dot(x, table, numerics=numerics, contract=1)[0]
