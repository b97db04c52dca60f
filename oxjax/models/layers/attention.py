"""Multi-head attention with grouped keys and values over pages."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from oxjax.cache.pages import KVPages, write_rows
from oxjax.config import AttentionSpec, ModelConfig, TemperatureSpec
from oxjax.kernels.paged_attention import paged_attention
from oxjax.models.layers.context import Context
from oxjax.models.layers.linear import Linear, linear, linears
from oxjax.models.layers.norms import Norm, norm
from oxjax.models.layers.rope import apply_rope


@struct.dataclass
class Attention:
    """Projections of one layer and, where the architecture has them, norms of queries and keys.

    The weight of such a norm is `[key_dim]` for all heads, `[heads, key_dim]` for each, or as long as the whole
    projection, which is then normalised at once. What is attended is multiplied by sigmoid(gate x), where there
    is a gate. Sinks are float32 logits of the query heads.
    """

    q: Linear
    k: Linear
    v: Linear
    out: Linear
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    gate: Linear | None = None
    sinks: Float[Array, " n_heads"] | None = None


def attention(
    p: Attention,
    x: Float[Array, "T d_model"],
    pages: KVPages,
    spec: AttentionSpec,
    ctx: Context,
) -> tuple[Float[Array, "T d_model"], KVPages]:
    """Project, normalise, rotate, write keys and values to the pages, attend, project back.

    Args:
        p: the layer's parameters.
        x: normalised residual rows.
        pages: the layer's pages; the new ones are returned.
        spec: the layer's static facts.
        ctx: the step's.
    """
    layout, config = ctx.layout, ctx.config
    projected = linears((p.q, p.k, p.v), x, config.numerics)
    if spec.clamp is not None:
        projected = tuple(jnp.clip(y, -spec.clamp, spec.clamp) for y in projected)
    q, k, v = (
        y.reshape(x.shape[0], heads, -1)
        for y, heads in zip(projected, (spec.n_heads, spec.n_kv_heads, spec.n_kv_heads), strict=True)
    )
    q, k = _normed(p.q_norm, q, config), _normed(p.k_norm, k, config)
    if spec.rope is not None:
        angles, rope = ctx.angles[spec.rope], config.ropes[spec.rope]
        q, k = (apply_rope(y, angles, rope, config.numerics) for y in (q, k))
    if spec.norm_rotated:
        q, k = (norm(Norm(), y, config) for y in (q, k))
    if spec.temperature is not None:
        q = q * growth(spec.temperature, layout.positions).astype(q.dtype)
    pages = write_rows(pages, k, v, page=layout.write_page, offset=layout.write_offset)
    mixed = paged_attention(
        q,
        pages.k,
        pages.v,
        layout,
        numerics=config.numerics,
        scale=spec.scale,
        window=spec.window,
        chunk=spec.chunk,
        softcap=spec.softcap,
        slopes=None if spec.alibi is None else alibi_slopes(spec.n_heads, spec.alibi),
        sinks=p.sinks,
    )
    mixed = mixed.reshape(x.shape[0], -1)
    if p.gate is not None:
        mixed = mixed * jax.nn.sigmoid(linear(p.gate, x, config.numerics))
    return linear(p.out, mixed, config.numerics), pages


def _normed(p: Norm | None, y: Array, config: ModelConfig) -> Array:
    """Rows of heads `[T, heads, key_dim]`, each stretch as long as the weight normalised on its own."""
    return y if p is None else norm(p, y.reshape(y.shape[0], -1, p.weight.shape[-1]), config).reshape(y.shape)


def growth(spec: TemperatureSpec, positions: Int[Array, " T"]) -> Float[Array, "T 1 1"]:
    """Factors of the queries at these positions."""
    steps = ((positions + spec.offset) // spec.length).astype(jnp.float32)
    return (1.0 + spec.scale * jnp.log(1.0 + steps))[:, None, None]


def alibi_slopes(n_heads: int, max_bias: float) -> Float[np.ndarray, " n_heads"]:
    """A geometric series over the heads (Press et al. 2022, https://arxiv.org/abs/2108.12409).

    Heads past the largest power of two take every other term of the series twice as fine.
    """
    whole = 2 ** math.floor(math.log2(n_heads))
    coarse = 2.0 ** (-max_bias / whole * np.arange(1, whole + 1))
    fine = 2.0 ** (-max_bias / whole / 2 * np.arange(1, 2 * (n_heads - whole), 2))
    return np.concatenate([coarse, fine]).astype(np.float32)
