"""LFM2's gated short convolution (Liquid AI 2025, https://arxiv.org/abs/2511.23404): its only state is its window."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from oxjax.cache.slots import RecurrentState, read_slots, write_slots
from oxjax.config import RecurrentSpec
from oxjax.models.layers.context import Context
from oxjax.models.layers.conv import Conv, causal_conv
from oxjax.models.layers.linear import Linear, linear, linears


@dataclass(frozen=True)
class ShortConvSpec(RecurrentSpec):
    """Its static facts; the recurrent state is empty, `[0]`."""


@struct.dataclass
class ShortConv:
    """Two gates and what they gate, all `[d_model, d_model]`, the taps, and the way back."""

    gate_in: Linear
    gate_out: Linear
    x: Linear
    conv: Conv
    out: Linear


def short_conv(
    p: ShortConv, x: Float[Array, "T d_model"], state: RecurrentState, spec: ShortConvSpec, ctx: Context
) -> tuple[Float[Array, "T d_model"], RecurrentState]:
    """out(gate_out x · conv(gate_in x · x x)). All but the projections is float32."""
    numerics, layout = ctx.config.numerics, ctx.layout
    old = read_slots(state, layout)
    gate_in, gate_out, inner = linears((p.gate_in, p.gate_out, p.x), x, numerics, dtype=jnp.float32)
    y, window = causal_conv(p.conv, gate_in * inner, old.conv, layout)
    out = linear(p.out, (gate_out * y).astype(x.dtype), numerics)
    return out, write_slots(state, RecurrentState(conv=window, ssm=old.ssm), layout)
