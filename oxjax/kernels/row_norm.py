"""RMS and layer norms of rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from oxjax.kernels.dot import row_sum
from oxjax.kernels.native import ffi_call
from oxjax.kernels.numerics import Numerics


def row_norm(
    x: Float[Array, "rows d"],
    weight: Float[Array, "n d"] | None,
    bias: Float[Array, " d"] | None,
    *,
    eps: float,
    centred: bool,
    numerics: Numerics,
) -> Float[Array, "rows d"]:
    """(x − m) / sqrt(mean((x − m)²) + eps) · w + b, in float32; m is the row's mean, or 0.

    Args:
        x: float32 rows.
        weight: row r has number r mod n; None is ones.
        bias: None is zeros.
        eps: keeps a row of zeros from dividing by 0.
        centred: subtract the mean (a layer norm), or not (an RMS norm).
        numerics: see `Numerics`; activations play no part.
    """
    if numerics.native:
        call = ffi_call("row_norm", jax.ShapeDtypeStruct(x.shape, jnp.float32))
        none = jnp.zeros((0, x.shape[1]), jnp.float32)
        weight, bias = none if weight is None else weight, none[:, 0] if bias is None else bias
        return call(x, weight, bias, eps=np.float32(eps), centred=centred)
    if centred:
        x = x - row_sum(x, numerics=numerics) / x.shape[1]
    y = x * lax.rsqrt(row_sum(x * x, numerics=numerics) / x.shape[1] + eps)
    if weight is not None:
        y = (y.reshape(-1, *weight.shape) * weight).reshape(y.shape)
    return y if bias is None else y + bias
