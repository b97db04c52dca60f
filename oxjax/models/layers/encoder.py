"""The block of an encoder: attention in both directions and a feed-forward network, normed before or after."""

from __future__ import annotations

from dataclasses import dataclass

from flax import struct
from jaxtyping import Array, Float

from oxjax.config import AttentionSpec, LayerSpec, ModelConfig
from oxjax.kernels.text_attention import TextLayout, text_attention
from oxjax.models.layers.attention import Attention, alibi_slopes
from oxjax.models.layers.context import Angles
from oxjax.models.layers.linear import linear, linears
from oxjax.models.layers.mlp import MLP
from oxjax.models.layers.moe import MoE, feed_forward
from oxjax.models.layers.norms import Norm, norm
from oxjax.models.layers.rope import apply_rope


@struct.dataclass
class EncoderLayer:
    """The two branches, and the norms that the architecture has.

    Attributes:
        attn: norms of queries and keys are over whole projections.
        mlp: the feed-forward network.
        attn_norm, mlp_norm: of what the branches read.
        attn_out_norm, mlp_out_norm: of the residual stream after each branch was added.
        attn_norm_2: of the residual stream with the block's input added once more, after `attn_out_norm`.
        bias: of attention scores by distance; see `text_attention`.
    """

    attn: Attention
    mlp: MLP | MoE
    attn_norm: Norm | None = None
    mlp_norm: Norm | None = None
    attn_out_norm: Norm | None = None
    attn_norm_2: Norm | None = None
    mlp_out_norm: Norm | None = None
    bias: Float[Array, "distances n_heads"] | None = None


@dataclass(frozen=True)
class EncoderContext:
    """A batch of texts as layers see it, besides their own parameters. Made while tracing.

    Attributes:
        layout: which rows belong together.
        angles: cosines and sines of the rows' positions for each of `config.ropes`.
        config: the model's.
    """

    layout: TextLayout
    angles: tuple[Angles, ...]
    config: ModelConfig


def encoder_block(
    p: EncoderLayer, x: Float[Array, "T d_model"], spec: LayerSpec, ctx: EncoderContext
) -> Float[Array, "T d_model"]:
    """One block; returns the residual rows."""

    def normed(weights: Norm | None, y: Array) -> Array:
        return y if weights is None else norm(weights, y, ctx.config)

    y = normed(p.attn_out_norm, x + _attention(p, normed(p.attn_norm, x), spec.mixers[0], ctx))
    if p.attn_norm_2 is not None:
        y = normed(p.attn_norm_2, y + x)
    read = normed(p.mlp_norm, y)
    fed = feed_forward(p.mlp, read, spec.mlp, ctx.config.numerics, is_real=ctx.layout.is_real)
    return normed(p.mlp_out_norm, y + fed)


def _attention(
    p: EncoderLayer, x: Float[Array, "T d_model"], spec: AttentionSpec, ctx: EncoderContext
) -> Float[Array, "T d_model"]:
    """Project, normalise, rotate, attend, project back."""
    config, attn = ctx.config, p.attn
    q, k, v = linears((attn.q, attn.k, attn.v), x, config.numerics)
    q, k = (y if n is None else norm(n, y, config) for n, y in ((attn.q_norm, q), (attn.k_norm, k)))
    heads = (spec.n_heads, spec.n_kv_heads, spec.n_kv_heads)
    q, k, v = (y.reshape(x.shape[0], n, -1) for y, n in zip((q, k, v), heads, strict=True))
    if spec.rope is not None:
        angles, rope = ctx.angles[spec.rope], config.ropes[spec.rope]
        q, k = (apply_rope(y, angles, rope, config.numerics) for y in (q, k))
    mixed = text_attention(
        q,
        k,
        v,
        ctx.layout,
        scale=spec.scale,
        window=spec.window,
        slopes=None if spec.alibi is None else alibi_slopes(spec.n_heads, spec.alibi),
        bias=p.bias,
    )
    return linear(attn.out, mixed.reshape(x.shape[0], -1), config.numerics)
