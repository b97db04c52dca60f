"""Normalisations, always computed in float32. Weights hold the final multiplier, as GGUF stores it."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float

from oxjax.config import ModelConfig
from oxjax.kernels.dot import row_sum


@struct.dataclass
class Norm:
    """Weight `[d]`, or `[heads, d]` for heads with weights of their own, and an optional bias; float32.

    OLMo's norms have no weight either.
    """

    weight: Float[Array, "*heads d"] | None = None
    bias: Float[Array, " d"] | None = None


def norm(p: Norm, x: Float[Array, "*rows d"], config: ModelConfig) -> Float[Array, "*rows d"]:
    """The model's kind of norm over the last axis."""
    kind = {"rms": rms_norm, "layer": layer_norm}[config.norm]
    return kind(p, x, eps=config.norm_eps, exact=config.exact)


def rms_norm(p: Norm, x: Float[Array, "*rows d"], *, eps: float, exact: bool) -> Float[Array, "*rows d"]:
    """x / sqrt(mean(x²) + eps) · w  (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467)."""
    xf = x.astype(jnp.float32)
    return _affine(p, xf * lax.rsqrt(_mean(xf * xf, exact) + eps)).astype(x.dtype)


def layer_norm(p: Norm, x: Float[Array, "*rows d"], *, eps: float, exact: bool) -> Float[Array, "*rows d"]:
    """(x − mean) / sqrt(var + eps) · w + b, biased variance (Ba et al. 2016, https://arxiv.org/abs/1607.06450)."""
    xf = x.astype(jnp.float32)
    centred = xf - _mean(xf, exact)
    return _affine(p, centred * lax.rsqrt(_mean(centred * centred, exact) + eps)).astype(x.dtype)


def _mean(x: Array, exact: bool) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    return row_sum(rows, exact=exact).reshape(*x.shape[:-1], 1) / x.shape[-1]


def _affine(p: Norm, y: Array) -> Array:
    """Times the weight, plus the bias; one of `[heads, d]` meets y's last two axes."""
    if p.weight is not None:
        y = y * (p.weight if p.weight.ndim == 1 else p.weight[None])
    return y if p.bias is None else y + p.bias
