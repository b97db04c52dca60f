"""The sequential transformer block: attention, then a gated MLP, each behind a norm and around a residual."""

from __future__ import annotations

from flax import struct
from jaxtyping import Array, Float

from oxjax.cache.pages import KVPages
from oxjax.config import LayerSpec
from oxjax.models.layers.attention import Attention, attention
from oxjax.models.layers.context import Context
from oxjax.models.layers.mlp import MLP, gated_mlp
from oxjax.models.layers.norms import Norm, rms_norm


@struct.dataclass
class TransformerLayer:
    """Norms before each branch and, where the architecture has them, on a branch's output too."""

    attn_norm: Norm
    attn: Attention
    mlp_norm: Norm
    mlp: MLP
    post_attn_norm: Norm | None = None
    post_mlp_norm: Norm | None = None


def transformer_block(
    p: TransformerLayer,
    x: Float[Array, "T d_model"],
    state: tuple[KVPages],
    spec: LayerSpec,
    ctx: Context,
) -> tuple[Float[Array, "T d_model"], tuple[KVPages]]:
    """One pre-norm block on RMS norms; returns the residual rows and the layer's new state."""

    config = ctx.config

    def norm(weights: Norm, y: Array) -> Array:
        return rms_norm(weights, y, eps=config.norm_eps, exact=config.exact)

    mixed, pages = attention(p.attn, norm(p.attn_norm, x), state[0], spec.mixers[0], ctx)
    x = x + (mixed if p.post_attn_norm is None else norm(p.post_attn_norm, mixed))
    fed = gated_mlp(p.mlp, norm(p.mlp_norm, x), activation=spec.mlp.activation, exact=config.exact)
    return x + (fed if p.post_mlp_norm is None else norm(p.post_mlp_norm, fed)), (pages,)
