"""Affine maps: the only place that knows how a weight matrix is held."""

from __future__ import annotations

from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from oxjax.kernels.dot import dot


@struct.dataclass
class Linear:
    """`y = x @ weight + bias`. The weight is `[d_in, d_out]`, in the model's dtype; the bias is float32."""

    weight: Float[Array, "d_in d_out"]
    bias: Float[Array, " d_out"] | None = None


def linear(
    *layers: Linear, x: Float[Array, "rows d_in"], exact: bool, dtype: DTypeLike | None = None
) -> tuple[Float[Array, "rows _"], ...]:
    """Apply several maps to the same rows.

    Args:
        layers: all take x's width; each gives its own.
        x: activations.
        exact: see `oxjax.kernels.dot`.
        dtype: of the results; x's unless given. Products and biases add up in float32 before.
    """
    products = dot(x, *(p.weight for p in layers), exact=exact)
    biased = (y if p.bias is None else y + p.bias for p, y in zip(layers, products, strict=True))
    return tuple(y.astype(x.dtype if dtype is None else dtype) for y in biased)
