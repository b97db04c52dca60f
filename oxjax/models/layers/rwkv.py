"""RWKV's block: time mixing, then channel mixing, which sees the row before too, or an MLP in its place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from oxjax.cache.slots import RecurrentState, read_slots, write_slots
from oxjax.config import DTYPES, LayerSpec, ModelConfig
from oxjax.models.layers.context import Context
from oxjax.models.layers.conv import previous_rows
from oxjax.models.layers.linear import Linear, linear
from oxjax.models.layers.mlp import MLP, mlp
from oxjax.models.layers.norms import Norm, norm
from oxjax.models.layers.rwkv6 import Rwkv6Spec, TimeMix6, time_mix6
from oxjax.models.layers.rwkv7 import TimeMix7, time_mix7


@struct.dataclass
class ChannelMix:
    """Key `[d_model, d_ff]`, value `[d_ff, d_model]`, and RWKV-6's gate, the receptance `[d_model, d_model]`.

    What is read is x + (the row before - x) · share, with a share per channel.
    """

    key_share: Float[Array, " d_model"]
    key: Linear
    value: Linear
    receptance_share: Float[Array, " d_model"] | None = None
    receptance: Linear | None = None


def channel_mix(
    p: ChannelMix, x: Float[Array, "T d_model"], before: Float[Array, "T d_model"], config: ModelConfig
) -> Float[Array, "T d_model"]:
    """sigmoid(receptance x) · value relu(key x)², float32 between the projections."""

    def project(layer: Linear, y: Array) -> Array:
        return linear(layer, y.astype(DTYPES[config.dtype]), config.numerics, dtype=jnp.float32)

    inner = jnp.square(jax.nn.relu(project(p.key, x + (before - x) * p.key_share)))
    y = project(p.value, inner)
    if p.receptance is None:
        return y
    return jax.nn.sigmoid(project(p.receptance, x + (before - x) * p.receptance_share)) * y


@struct.dataclass
class RwkvLayer:
    """The two branches and the norms of what they read."""

    norm: Norm
    time_mix: TimeMix6 | TimeMix7
    mlp_norm: Norm
    mlp: ChannelMix | MLP

    def apply(
        self, x: Array, state: tuple[RecurrentState], spec: LayerSpec, ctx: Context
    ) -> tuple[Array, tuple[RecurrentState]]:
        """Run the block; see `rwkv_block`."""
        return rwkv_block(self, x, state, spec, ctx)


def rwkv_block(
    p: RwkvLayer,
    x: Float[Array, "T width"],
    state: tuple[RecurrentState],
    spec: LayerSpec,
    ctx: Context,
) -> tuple[Float[Array, "T new_width"], tuple[RecurrentState]]:
    """One block; its state is the scan's, and the last rows that its branches read, side by side as one window.

    RWKV-7's first block appends its values to the residual rows, and every later one hands them on.
    """
    config, layout, (mixer,) = ctx.config, ctx.layout, spec.mixers
    d_model, old = config.d_model, read_slots(state[0], layout)
    x, first_value = x[:, :d_model], x[:, d_model:]
    y = _rounded(norm(p.norm, x, config))
    before, window = previous_rows(y, old.conv[..., :d_model], layout)
    if isinstance(p.time_mix, TimeMix6):
        mixed, ssm = time_mix6(p.time_mix, y, before, old.ssm, mixer, ctx)
    else:
        first = first_value.astype(jnp.float32)
        mixed, first, ssm = time_mix7(p.time_mix, y, before, first, old.ssm, mixer, ctx)
        first_value = first.astype(x.dtype)
    x = x + mixed.astype(x.dtype)
    y = norm(p.mlp_norm, x, config)
    if isinstance(p.mlp, ChannelMix):
        y = _rounded(y)
        before, channel_window = previous_rows(y, old.conv[..., d_model:], layout)
        window = jnp.concatenate([window, channel_window], axis=-1)
        x = x + channel_mix(p.mlp, y, before, config).astype(x.dtype)
    else:
        x = x + mlp(p.mlp, y, spec.mlp, config.numerics)
    if isinstance(mixer, Rwkv6Spec) and mixer.scale != 1.0:
        x = x * mixer.scale
    new = write_slots(state[0], RecurrentState(conv=window, ssm=ssm), layout)
    return jnp.concatenate([x, first_value], axis=1), (new,)


def _rounded(x: Float[Array, "T d_model"]) -> Float[Array, "T d_model"]:
    """The same in float32, rounded before it is used.

    The norm's last product and the difference to the row before may become one operation that rounds once, and in a
    program of a single row tile they do. A bound that never binds keeps them apart; barriers do not.
    """
    return jnp.maximum(x.astype(jnp.float32), jnp.finfo(jnp.float32).min)
