"""Mamba-2: heads that decay by one number (Dao & Gu 2024, https://arxiv.org/abs/2405.21060)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from oxjax.batch import RowLayout
from oxjax.cache.slots import RecurrentState, read_slots, write_slots
from oxjax.config import RecurrentSpec
from oxjax.kernels.linear_scan import linear_scan
from oxjax.models.layers.chunks import decay_between, product
from oxjax.models.layers.context import Context
from oxjax.models.layers.conv import Conv, causal_conv
from oxjax.models.layers.linear import Linear, linear, linears
from oxjax.models.layers.norms import Norm, rms_norm
from oxjax.models.layers.recurrence import NATIVE, ScanMethod, recurrence, scan_method


@dataclass(frozen=True)
class Mamba2Spec(RecurrentSpec):
    """Its static facts; a sequence's state is `[n_heads, d_state, head_dim]`.

    Attributes:
        n_groups: of heads that share b and c; divides the heads.
    """

    n_groups: int


@struct.dataclass
class Mamba2:
    """Parameters of one layer, with d_inner = n_heads · head_dim and channels = d_inner + 2 · n_groups · d_state.

    Attributes:
        z: the gate, `[d_model, d_inner]`.
        xbc: what is convolved: x, then b and c of each group, `[d_model, channels]`.
        dt: the step size of each head, `[d_model, n_heads]`; with bias.
        conv: over all channels.
        a: the (negative) rates, float32.
        d: the direct path, float32.
        out: `[d_inner, d_model]`.
        norm: of the gated output, each group on its own, `[n_groups, d_inner / n_groups]`.
    """

    z: Linear
    xbc: Linear
    dt: Linear
    conv: Conv
    a: Float[Array, " n_heads"]
    d: Float[Array, " n_heads"]
    out: Linear
    norm: Norm | None = None


def mamba2(
    p: Mamba2, x: Float[Array, "T d_model"], state: RecurrentState, spec: Mamba2Spec, ctx: Context
) -> tuple[Float[Array, "T d_model"], RecurrentState]:
    """Project, convolve, scan, gate, normalise, project back. All but the projections is float32.

    Args:
        p: the layer's parameters.
        x: normalised residual rows.
        state: the layer's slots; the new ones are returned.
        spec: the layer's static facts.
        ctx: the step's.
    """
    layout, numerics = ctx.layout, ctx.config.numerics
    n_rows, (n_heads, d_state, head_dim) = x.shape[0], spec.ssm
    old = read_slots(state, layout)
    z, xbc, dt = linears((p.z, p.xbc, p.dt), x, numerics, dtype=jnp.float32)
    xbc, window = causal_conv(p.conv, xbc, old.conv, layout)
    xbc = jax.nn.silu(xbc)
    d_inner, d_groups = n_heads * head_dim, spec.n_groups * d_state
    heads = xbc[:, :d_inner].reshape(n_rows, n_heads, head_dim)
    b = xbc[:, d_inner : d_inner + d_groups].reshape(n_rows, spec.n_groups, d_state)
    c = xbc[:, d_inner + d_groups :].reshape(n_rows, spec.n_groups, d_state)
    y, ssm = decaying_scan(p.a, jax.nn.softplus(dt), heads, b, c, old.ssm, layout, method=scan_method(numerics))
    y = (y + p.d[:, None] * heads).reshape(n_rows, -1) * jax.nn.silu(z)
    if p.norm is not None:
        grouped = y.reshape(n_rows, spec.n_groups, -1)
        y = rms_norm(p.norm, grouped, eps=ctx.config.norm_eps, numerics=numerics).reshape(n_rows, -1)
    out = linear(p.out, y.astype(x.dtype), numerics)
    return out, write_slots(state, RecurrentState(conv=window, ssm=ssm), layout)


def decaying_scan(
    a: Float[Array, " n_heads"],
    dt: Float[Array, "T n_heads"],
    x: Float[Array, "T n_heads head_dim"],
    b: Float[Array, "T n_groups d_state"],
    c: Float[Array, "T n_groups d_state"],
    initial: Float[Array, "S n_heads d_state head_dim"],
    layout: RowLayout,
    *,
    method: ScanMethod,
) -> tuple[Float[Array, "T n_heads head_dim"], Float[Array, "S n_heads d_state head_dim"]]:
    """h ← exp(dt a) h + b ⊗ (dt x), y = cᵀ h for each head; head h uses group h // (n_heads / n_groups).

    `method` is as from `scan_method`.
    """
    if method == NATIVE:
        return linear_scan(c, jnp.exp(dt * a)[..., None], b, dt[..., None] * x, initial, layout)
    per_group = a.shape[0] // b.shape[1]

    def step(h: Array, dt: Array, x: Array, b: Array, c: Array) -> tuple[Array, Array]:
        b, c = (jnp.repeat(y, per_group, axis=0) for y in (b, c))
        h = h * jnp.exp(dt * a)[:, None, None] + b[:, :, None] * (dt[:, None] * x)[:, None]
        return h, jnp.sum(h * c[:, :, None], axis=1)

    def chunk(h: Array, dt: Array, x: Array, b: Array, c: Array) -> tuple[Array, Array]:
        # Section 6 of the paper: pairs of rows inside the chunk as attention, everything before as one state.
        decay, before, after = decay_between(jnp.exp(dt * a).T)
        b, c = (jnp.swapaxes(y, 0, 1) for y in (b, c))
        scores = jnp.repeat(product(c, jnp.swapaxes(b, 1, 2)), per_group, axis=0) * decay
        b, c = (jnp.repeat(y, per_group, axis=0) for y in (b, c))
        fed = jnp.swapaxes(dt[..., None] * x, 0, 1)
        y = product(scores, fed) + before * product(c, h)
        h = before[:, -1:] * h + product(jnp.swapaxes(b, 1, 2), after * fed)
        return h, jnp.swapaxes(y, 0, 1)

    return recurrence(step, chunk, initial, (dt, x, b, c), layout, method=method)
