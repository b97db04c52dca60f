"""The transformer block: attention and a feed-forward network, one after the other or side by side."""

from __future__ import annotations

from flax import struct
from jaxtyping import Array, Float

from oxjax.cache.pages import KVPages, LatentPages
from oxjax.config import LatentSpec, LayerSpec
from oxjax.models.layers.attention import Attention, attention
from oxjax.models.layers.context import Context
from oxjax.models.layers.latent import LatentAttention, latent_attention
from oxjax.models.layers.mlp import MLP
from oxjax.models.layers.moe import MoE, feed_forward
from oxjax.models.layers.norms import Norm, norm


@struct.dataclass
class TransformerLayer:
    """The two branches, and the norms on their inputs and outputs that the architecture has.

    A branch without a norm on its input reads the residual stream as it is; side by side, an MLP without
    one reads what the attention reads.
    """

    attn: Attention | LatentAttention
    mlp: MLP | MoE
    attn_norm: Norm | None = None
    mlp_norm: Norm | None = None
    post_attn_norm: Norm | None = None
    post_mlp_norm: Norm | None = None


def transformer_block(
    p: TransformerLayer,
    x: Float[Array, "T d_model"],
    state: tuple[KVPages | LatentPages],
    spec: LayerSpec,
    ctx: Context,
) -> tuple[Float[Array, "T d_model"], tuple[KVPages | LatentPages]]:
    """One block; returns the residual rows and the layer's new state."""
    config = ctx.config

    def normed(weights: Norm | None, y: Array) -> Array:
        return y if weights is None else norm(weights, y, config)

    def added(x: Array, weights: Norm | None, branch: Array) -> Array:
        branch = normed(weights, branch)
        return x + (branch if config.residual_scale == 1.0 else branch * config.residual_scale)

    attn_input = normed(p.attn_norm, x)
    mix = latent_attention if isinstance(spec.mixers[0], LatentSpec) else attention
    mixed, pages = mix(p.attn, attn_input, state[0], spec.mixers[0], ctx)
    if spec.parallel:
        mlp_input = attn_input if p.mlp_norm is None else normed(p.mlp_norm, x)
        x = added(x, p.post_attn_norm, mixed)
    else:
        x = added(x, p.post_attn_norm, mixed)
        mlp_input = normed(p.mlp_norm, x)
    branch = feed_forward(p.mlp, mlp_input, spec.mlp, exact=config.exact, is_real=ctx.layout.is_real)
    return added(x, p.post_mlp_norm, branch), (pages,)
