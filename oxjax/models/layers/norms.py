"""Normalisations, always computed in float32. Weights hold the final multiplier, as GGUF stores it."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float

from oxjax.kernels.dot import row_sum


@struct.dataclass
class Norm:
    """Weight `[d]` and, for layer norm, an optional bias `[d]`; float32."""

    weight: Float[Array, " d"]
    bias: Float[Array, " d"] | None = None


def rms_norm(p: Norm, x: Float[Array, "rows d"], *, eps: float, exact: bool) -> Float[Array, "rows d"]:
    """x / sqrt(mean(x²) + eps) · w  (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467)."""
    xf = x.astype(jnp.float32)
    mean_square = row_sum(xf * xf, exact=exact) / x.shape[-1]
    return (xf * lax.rsqrt(mean_square + eps) * p.weight).astype(x.dtype)


def layer_norm(p: Norm, x: Float[Array, "rows d"], *, eps: float, exact: bool) -> Float[Array, "rows d"]:
    """(x − mean) / sqrt(var + eps) · w + b, biased variance (Ba et al. 2016, https://arxiv.org/abs/1607.06450)."""
    xf = x.astype(jnp.float32)
    centred = xf - row_sum(xf, exact=exact) / x.shape[-1]
    variance = row_sum(centred * centred, exact=exact) / x.shape[-1]
    y = centred * lax.rsqrt(variance + eps) * p.weight
    return (y if p.bias is None else y + p.bias).astype(x.dtype)


def head_rms_norm(
    p: Norm, x: Float[Array, "rows heads head_dim"], *, eps: float, exact: bool
) -> Float[Array, "rows heads head_dim"]:
    """RMS norm of each head on its own, one weight `[head_dim]` for all of them (QK-norm)."""
    flat = rms_norm(p, x.reshape(-1, x.shape[-1]), eps=eps, exact=exact)
    return flat.reshape(x.shape)
