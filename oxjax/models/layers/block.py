"""The block of a decoder: mixers side by side, a feed-forward network, and the norms around them."""

from __future__ import annotations

from typing import Any

from flax import struct
from jaxtyping import Array, Float

from oxjax.cache.pages import KVPages, LatentPages
from oxjax.cache.slots import RecurrentState
from oxjax.config import AttentionSpec, LatentSpec, LayerSpec
from oxjax.models.layers.attention import attention
from oxjax.models.layers.context import Context
from oxjax.models.layers.delta_net import DeltaNetSpec, delta_net
from oxjax.models.layers.kimi_delta import KimiDeltaSpec, kimi_delta
from oxjax.models.layers.latent import latent_attention
from oxjax.models.layers.mamba import MambaSpec, mamba
from oxjax.models.layers.mamba2 import Mamba2Spec, mamba2
from oxjax.models.layers.mlp import MLP
from oxjax.models.layers.moe import MoE, feed_forward
from oxjax.models.layers.norms import Norm, norm
from oxjax.models.layers.plamo_mamba import PlamoMambaSpec, plamo_mamba
from oxjax.models.layers.short_conv import ShortConvSpec, short_conv

LayerState = tuple[KVPages | LatentPages | RecurrentState, ...]  # one per mixer

MIXERS = {
    AttentionSpec: attention,
    DeltaNetSpec: delta_net,
    KimiDeltaSpec: kimi_delta,
    LatentSpec: latent_attention,
    MambaSpec: mamba,
    Mamba2Spec: mamba2,
    PlamoMambaSpec: plamo_mamba,
    ShortConvSpec: short_conv,
}


@struct.dataclass
class Layer:
    """The two branches, of which one may be missing, and the norms on their inputs and outputs.

    A branch without a norm on its input reads the residual stream as it is; side by side, an MLP without
    one reads what the mixers read.
    """

    mixers: tuple[Any, ...]
    norm: Norm | None = None
    post_norm: Norm | None = None
    mlp: MLP | MoE | None = None
    mlp_norm: Norm | None = None
    post_mlp_norm: Norm | None = None

    def apply(self, x: Array, state: LayerState, spec: LayerSpec, ctx: Context) -> tuple[Array, LayerState]:
        """Run the block; see `block`."""
        return block(self, x, state, spec, ctx)


def block(
    p: Layer,
    x: Float[Array, "T d_model"],
    state: LayerState,
    spec: LayerSpec,
    ctx: Context,
) -> tuple[Float[Array, "T d_model"], LayerState]:
    """One block; returns the residual rows and the layer's new state. What several mixers give is added up."""
    config = ctx.config

    def normed(weights: Norm | None, y: Array) -> Array:
        return y if weights is None else norm(weights, y, config)

    def added(x: Array, weights: Norm | None, branch: Array) -> Array:
        branch = normed(weights, branch)
        return x + (branch if config.residual_scale == 1.0 else branch * config.residual_scale)

    read, mlp_input, new = x, None, ()
    if p.mixers:
        read = normed(p.norm, x)
        mixers = zip(p.mixers, state, spec.mixers, strict=True)
        mixed, new = zip(*(MIXERS[type(s)](mixer, read, old, s, ctx) for mixer, old, s in mixers), strict=True)
        if spec.parallel:
            mlp_input = read if p.mlp_norm is None else normed(p.mlp_norm, x)
        x = added(x, p.post_norm, sum(mixed[1:], mixed[0]))
    if p.mlp is not None:
        mlp_input = normed(p.mlp_norm, x) if mlp_input is None else mlp_input
        fed = feed_forward(p.mlp, mlp_input, spec.mlp, config.numerics, is_real=ctx.layout.is_real)
        x = added(x, p.post_mlp_norm, fed)
    return x, new
