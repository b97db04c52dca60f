"""Kimi Delta Attention: DeltaNet whose key channels forget each at its own rate (Kimi Team 2025,
https://arxiv.org/abs/2510.26692).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from oxjax.cache.slots import RecurrentState, read_slots, write_slots
from oxjax.config import RecurrentSpec
from oxjax.models.layers.context import Context
from oxjax.models.layers.conv import Conv, causal_conv
from oxjax.models.layers.delta_net import delta_scan, unit
from oxjax.models.layers.linear import Linear, linear, linears
from oxjax.models.layers.norms import Norm, rms_norm
from oxjax.models.layers.recurrence import scan_method


@dataclass(frozen=True)
class KimiDeltaSpec(RecurrentSpec):
    """Its static facts; a sequence's state is `[n_heads, head_dim, head_dim]`, keys by values."""


@struct.dataclass
class KimiDelta:
    """Parameters of one layer, with d_inner = n_heads · head_dim.

    Attributes:
        q, k, v: what is convolved, `[d_model, d_inner]` each.
        beta: how much of the correction each head stores, `[d_model, n_heads]`.
        decay: how fast each key channel forgets: a narrow map and one to `d_inner`, with bias.
        gate: of the output, a narrow map and one to `d_inner`.
        conv: over the channels of q, k and v, in this order.
        a: the (negative) rates, float32.
        norm: of each head's output, `[head_dim]`.
        out: `[d_inner, d_model]`.
    """

    q: Linear
    k: Linear
    v: Linear
    beta: Linear
    decay: tuple[Linear, Linear]
    gate: tuple[Linear, Linear]
    conv: Conv
    a: Float[Array, " n_heads"]
    norm: Norm
    out: Linear


def kimi_delta(
    p: KimiDelta, x: Float[Array, "T d_model"], state: RecurrentState, spec: KimiDeltaSpec, ctx: Context
) -> tuple[Float[Array, "T d_model"], RecurrentState]:
    """Project, convolve, scan, normalise, gate, project back. All but the projections is float32.

    Args:
        p: the layer's parameters.
        x: normalised residual rows.
        state: the layer's slots; the new ones are returned.
        spec: the layer's static facts.
        ctx: the step's.
    """
    layout, numerics, eps = ctx.layout, ctx.config.numerics, ctx.config.norm_eps
    n_heads, head_dim, _ = spec.ssm

    def project(y: Array, *layers: Linear) -> tuple[Array, ...]:
        return linears(layers, y.astype(x.dtype), numerics, dtype=jnp.float32)

    def heads(y: Array) -> Array:
        return y.reshape(x.shape[0], n_heads, head_dim)

    old = read_slots(state, layout)
    *qkv, beta, decay, gate = project(x, p.q, p.k, p.v, p.beta, p.decay[0], p.gate[0])
    (decay,), (gate,) = project(decay, p.decay[1]), project(gate, p.gate[1])
    qkv, window = causal_conv(p.conv, jnp.concatenate(qkv, axis=1), old.conv, layout)
    q, k, v = jnp.split(jax.nn.silu(qkv), 3, axis=1)
    q, k = (heads(unit(y.reshape(-1, head_dim), eps, numerics)) for y in (q, k))
    log_decay = jax.nn.softplus(heads(decay)) * p.a[:, None]
    beta, q = jax.nn.sigmoid(beta), q * head_dim**-0.5
    y, ssm = delta_scan(q, k, heads(v), log_decay, beta, old.ssm, layout, method=scan_method(numerics))
    y = rms_norm(p.norm, y, eps=eps, numerics=numerics).reshape(x.shape[0], -1) * jax.nn.sigmoid(gate)
    out = linear(p.out, y.astype(x.dtype), numerics)
    return out, write_slots(state, RecurrentState(conv=window, ssm=ssm), layout)
