"""PLaMo 2's Mamba: the heads and the scan of Mamba-2, fed the way of Mamba (Preferred Networks 2025).

As in Mamba the step sizes, b and c come from what was convolved, through a narrow projection, here with norms; as in
Mamba-2 a head decays by one number. See https://huggingface.co/pfnet/plamo-2-8b.
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
from oxjax.models.layers.linear import Linear, linear, linears
from oxjax.models.layers.mamba import scan_inputs
from oxjax.models.layers.mamba2 import decaying_scan
from oxjax.models.layers.norms import Norm
from oxjax.models.layers.recurrence import scan_method


@dataclass(frozen=True)
class PlamoMambaSpec(RecurrentSpec):
    """Its static facts; a sequence's state is `[n_heads, d_state, head_dim]`.

    Attributes:
        dt_rank: width of the projection that the step sizes come from.
    """

    dt_rank: int


@struct.dataclass
class PlamoMamba:
    """Parameters of one layer, with d_inner = n_heads · head_dim.

    Attributes:
        z, x: the gate and the convolved branch, `[d_model, d_inner]`.
        conv: over d_inner channels.
        b, c, dt_low: from d_inner to d_state, d_state and dt_rank.
        b_norm, c_norm, dt_norm: RMS norms of them.
        dt: from dt_rank to the step size of each head; with bias.
        a: the (negative) rates, float32.
        d: the direct path, float32.
        out: `[d_inner, d_model]`.
    """

    z: Linear
    x: Linear
    conv: Conv
    b: Linear
    c: Linear
    dt_low: Linear
    b_norm: Norm
    c_norm: Norm
    dt_norm: Norm
    dt: Linear
    a: Float[Array, " n_heads"]
    d: Float[Array, " n_heads"]
    out: Linear


def plamo_mamba(
    p: PlamoMamba, x: Float[Array, "T d_model"], state: RecurrentState, spec: PlamoMambaSpec, ctx: Context
) -> tuple[Float[Array, "T d_model"], RecurrentState]:
    """Project, convolve, scan, gate, project back. All but the projections is float32.

    Args:
        p: the layer's parameters.
        x: normalised residual rows.
        state: the layer's slots; the new ones are returned.
        spec: the layer's static facts.
        ctx: the step's.
    """
    layout, numerics = ctx.layout, ctx.config.numerics
    old = read_slots(state, layout)
    z, inner = linears((p.z, p.x), x, numerics, dtype=jnp.float32)
    inner, window = causal_conv(p.conv, inner, old.conv, layout)
    inner = jax.nn.silu(inner)
    dt, b, c = scan_inputs(p, inner.astype(x.dtype), ctx)
    heads = inner.reshape(x.shape[0], spec.ssm[0], spec.ssm[2])
    y, ssm = decaying_scan(p.a, dt, heads, b[:, None], c[:, None], old.ssm, layout, method=scan_method(numerics))
    y = (y + p.d[:, None] * heads).reshape(x.shape[0], -1) * jax.nn.silu(z)
    out = linear(p.out, y.astype(x.dtype), numerics)
    return out, write_slots(state, RecurrentState(conv=window, ssm=ssm), layout)
