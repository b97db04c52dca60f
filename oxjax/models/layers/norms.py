"""Normalisations, always computed in float32. Weights hold the final multiplier, as GGUF stores it."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from oxjax.config import ModelConfig
from oxjax.kernels.numerics import Numerics
from oxjax.kernels.row_norm import row_norm


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
    return kind(p, x, eps=config.norm_eps, numerics=config.numerics)


def rms_norm(p: Norm, x: Float[Array, "*rows d"], *, eps: float, numerics: Numerics) -> Float[Array, "*rows d"]:
    """x / sqrt(mean(x²) + eps) · w  (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467)."""
    return _norm(p, x, eps=eps, centred=False, numerics=numerics)


def layer_norm(p: Norm, x: Float[Array, "*rows d"], *, eps: float, numerics: Numerics) -> Float[Array, "*rows d"]:
    """(x − mean) / sqrt(var + eps) · w + b, biased variance (Ba et al. 2016, https://arxiv.org/abs/1607.06450)."""
    return _norm(p, x, eps=eps, centred=True, numerics=numerics)


def _norm(p: Norm, x: Array, *, eps: float, centred: bool, numerics: Numerics) -> Array:
    """Weights of `[heads, d]` meet x's last two axes."""
    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    weight = None if p.weight is None else jnp.atleast_2d(p.weight)
    y = row_norm(rows, weight, p.bias, eps=eps, centred=centred, numerics=numerics)
    return y.reshape(x.shape).astype(x.dtype)
