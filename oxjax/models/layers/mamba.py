"""Mamba: a selective state-space model (Gu & Dao 2023, https://arxiv.org/abs/2312.00752)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float

from oxjax.batch import RowLayout
from oxjax.cache.slots import RecurrentState, read_slots, write_slots
from oxjax.config import RecurrentSpec
from oxjax.models.layers.context import Context
from oxjax.models.layers.conv import Conv, causal_conv
from oxjax.models.layers.linear import Linear, linear, linears
from oxjax.models.layers.norms import Norm, rms_norm
from oxjax.models.layers.recurrence import ScanMethod, recurrence, scan_method


@dataclass(frozen=True)
class MambaSpec(RecurrentSpec):
    """Its static facts; a sequence's state is `[d_state, d_inner]`.

    Attributes:
        dt_rank: width of the projection that the step sizes come from.
        low_norm: RMS norms of that projection, of b and of c: "learned", "unit" without weights, or None.
    """

    dt_rank: int
    low_norm: str | None = None


@struct.dataclass
class Mamba:
    """Parameters of one layer.

    Attributes:
        x, z: the convolved branch and its gate, `[d_model, d_inner]`.
        conv: over d_inner channels.
        dt_low, b, c: from d_inner to dt_rank, d_state and d_state.
        dt: from dt_rank to the step size of each channel; with bias.
        a: the (negative) rates, float32.
        d: the direct path, float32.
        out: `[d_inner, d_model]`.
        dt_norm, b_norm, c_norm: RMS norms of dt_low, b and c where the architecture has them.
    """

    x: Linear
    z: Linear
    conv: Conv
    dt_low: Linear
    b: Linear
    c: Linear
    dt: Linear
    a: Float[Array, "d_state d_inner"]
    d: Float[Array, " d_inner"]
    out: Linear
    dt_norm: Norm | None = None
    b_norm: Norm | None = None
    c_norm: Norm | None = None


def mamba(
    p: Mamba, x: Float[Array, "T d_model"], state: RecurrentState, spec: MambaSpec, ctx: Context
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
    inner, gate = linears((p.x, p.z), x, numerics, dtype=jnp.float32)
    inner, window = causal_conv(p.conv, inner, old.conv, layout)
    inner = jax.nn.silu(inner)
    dt, b, c = scan_inputs(p, inner.astype(x.dtype), ctx)
    y, ssm = selective_scan(p.a, dt, inner, b, c, old.ssm, layout, method=scan_method(numerics, has_kernel=False))
    y = (y + p.d * inner) * jax.nn.silu(gate)
    out = linear(p.out, y.astype(x.dtype), numerics)
    return out, write_slots(state, RecurrentState(conv=window, ssm=ssm), layout)


def scan_inputs(
    p: Any, x: Float[Array, "T d_inner"], ctx: Context
) -> tuple[Float[Array, "T steps"], Float[Array, "T d_state"], Float[Array, "T d_state"]]:
    """Step sizes, b and c from what was convolved, through the narrow projections of `Mamba` or a relative of it."""
    config = ctx.config
    low = linears((p.dt_low, p.b, p.c), x, config.numerics, dtype=jnp.float32)
    dt, b, c = (
        y if norm is None else rms_norm(norm, y, eps=config.norm_eps, numerics=config.numerics)
        for y, norm in zip(low, (p.dt_norm, p.b_norm, p.c_norm), strict=True)
    )
    dt = linear(p.dt, dt.astype(x.dtype), config.numerics, dtype=jnp.float32)
    return jax.nn.softplus(dt), b, c


def selective_scan(
    a: Float[Array, "d_state d_inner"],
    dt: Float[Array, "T d_inner"],
    x: Float[Array, "T d_inner"],
    b: Float[Array, "T d_state"],
    c: Float[Array, "T d_state"],
    initial: Float[Array, "S d_state d_inner"],
    layout: RowLayout,
    *,
    method: ScanMethod,
) -> tuple[Float[Array, "T d_inner"], Float[Array, "S d_state d_inner"]]:
    """h ← exp(dt a) h + b ⊗ (dt x), y = cᵀ h: every channel has d_state numbers of its own (algorithm 2).

    `method` is as from `scan_method`.
    """

    def step(h: Array, dt: Array, x: Array, b: Array, c: Array) -> tuple[Array, Array]:
        h = h * jnp.exp(dt * a) + b[:, None] * (dt * x)
        return h, jnp.sum(h * c[:, None], axis=0)

    def chunk(h: Array, dt: Array, x: Array, b: Array, c: Array) -> tuple[Array, Array]:
        # Every number fades at its own rate, which leaves no matrix product to make of it but the scan of section
        # 3.3.2. On two CPU cores 512 rows of 2048 channels take 140 ms so, in chunks of 16, and 15 ms one by one.
        decay, fed = jnp.exp(dt[:, None] * a), b[:, :, None] * (dt * x)[:, None]
        decay, fed = lax.associative_scan(lambda y, z: (y[0] * z[0], y[1] * z[0] + z[1]), (decay, fed))
        states = decay * h + fed
        return states[-1], jnp.sum(states * c[:, :, None], axis=1)

    return recurrence(step, chunk, initial, (dt, x, b, c), layout, method=method)
