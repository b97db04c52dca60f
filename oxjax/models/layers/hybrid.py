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
from oxjax.models.layers.plamo_mamba import PlamoMambaSpec, plamo_mamba
from oxjax.models.layers.short_conv import ShortConvSpec, short_conv

MIXERS = {
    AttentionSpec: attention,
    DeltaNetSpec: delta_net,
    MambaSpec: mamba,
    Mamba2Spec: mamba2,
    PlamoMambaSpec: plamo_mamba,
    ShortConvSpec: short_conv,
}


@struct.dataclass
class HybridLayer:
    """The mixers and the norm of what they read, the feed-forward layer and its norm; either may be missing.

    The post norms are of what a branch adds, where the architecture has them.
    """

    norm: Norm | None
    mixers: tuple[Any, ...]
    mlp_norm: Norm | None = None
    mlp: MLP | MoE | None = None
    post_norm: Norm | None = None
    post_mlp_norm: Norm | None = None


def hybrid_block(
    p: HybridLayer,
    x: Float[Array, "T d_model"],
    state: tuple[KVPages | RecurrentState, ...],
    spec: LayerSpec,
    ctx: Context,
) -> tuple[Float[Array, "T d_model"], tuple[KVPages | RecurrentState, ...]]:
    """One block; the mixers read the same rows and what they give is added up."""
    config = ctx.config

    def added(x: Array, branch: Array, post: Norm | None) -> Array:
        branch = branch if post is None else norm(post, branch, config)
        return x + (branch if config.residual_scale == 1.0 else branch * config.residual_scale)

    new = ()
    if p.mixers:
        y = norm(p.norm, x, config)
        mixers = zip(p.mixers, state, spec.mixers, strict=True)
        mixed, new = zip(*(MIXERS[type(s)](mixer, y, old, s, ctx) for mixer, old, s in mixers), strict=True)
        x = added(x, sum(mixed[1:], mixed[0]), p.post_norm)
    if p.mlp is not None:
        y = norm(p.mlp_norm, x, config)
        fed = feed_forward(p.mlp, y, spec.mlp, exact=config.exact, is_real=ctx.layout.is_real)
        x = added(x, fed, p.post_mlp_norm)
    return x, new
