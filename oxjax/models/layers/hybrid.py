"""A block of any mixers, side by side where there are several, and then a feed-forward layer if it has one."""

from __future__ import annotations

from typing import Any

from flax import struct
from jaxtyping import Array, Float

from oxjax.cache.pages import KVPages
from oxjax.cache.slots import RecurrentState
from oxjax.config import AttentionSpec, LayerSpec
from oxjax.models.layers.attention import attention
from oxjax.models.layers.context import Context
from oxjax.models.layers.delta_net import DeltaNetSpec, delta_net
from oxjax.models.layers.mamba import MambaSpec, mamba
from oxjax.models.layers.mamba2 import Mamba2Spec, mamba2
from oxjax.models.layers.mlp import MLP
from oxjax.models.layers.moe import MoE, feed_forward
from oxjax.models.layers.norms import Norm, norm
from oxjax.models.layers.short_conv import ShortConvSpec, short_conv

MIXERS = {
    AttentionSpec: attention,
    DeltaNetSpec: delta_net,
    MambaSpec: mamba,
    Mamba2Spec: mamba2,
    ShortConvSpec: short_conv,
}


@struct.dataclass
class HybridLayer:
    """The mixers and the norm of what they read, the feed-forward layer and its norm; either may be missing."""

    norm: Norm | None
    mixers: tuple[Any, ...]
    mlp_norm: Norm | None = None
    mlp: MLP | MoE | None = None


def hybrid_block(
    p: HybridLayer,
    x: Float[Array, "T d_model"],
    state: tuple[KVPages | RecurrentState, ...],
    spec: LayerSpec,
    ctx: Context,
) -> tuple[Float[Array, "T d_model"], tuple[KVPages | RecurrentState, ...]]:
    """One block; the mixers read the same rows and what they give is added up."""
    config = ctx.config

    def added(x: Array, branch: Array) -> Array:
        return x + (branch if config.residual_scale == 1.0 else branch * config.residual_scale)

    new = ()
    if p.mixers:
        y = norm(p.norm, x, config)
        mixers = zip(p.mixers, state, spec.mixers, strict=True)
        mixed, new = zip(*(MIXERS[type(s)](mixer, y, old, s, ctx) for mixer, old, s in mixers), strict=True)
        x = added(x, sum(mixed[1:], mixed[0]))
    if p.mlp is not None:
        y = norm(p.mlp_norm, x, config)
        x = added(x, feed_forward(p.mlp, y, spec.mlp, exact=config.exact, is_real=ctx.layout.is_real))
    return x, new
