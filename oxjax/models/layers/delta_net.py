"""Gated DeltaNet: linear attention that corrects what it stored (Yang et al. 2024, https://arxiv.org/abs/2412.06464)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float

from oxjax.batch import RowLayout
from oxjax.cache.slots import RecurrentState, read_slots, write_slots
from oxjax.config import RecurrentSpec
from oxjax.kernels.dot import row_sum
from oxjax.kernels.linear_scan import linear_scan
from oxjax.kernels.numerics import Numerics
from oxjax.models.layers.chunks import decay_between, fading_products, inverse_of_unit_lower, product
from oxjax.models.layers.context import Context
from oxjax.models.layers.conv import Conv, causal_conv
from oxjax.models.layers.linear import Linear, linear, linears
from oxjax.models.layers.norms import Norm, rms_norm
from oxjax.models.layers.recurrence import NATIVE, ScanMethod, recurrence, scan_method


@dataclass(frozen=True)
class DeltaNetSpec(RecurrentSpec):
    """Its static facts; a sequence's state is `[n_value_heads, key_dim, value_dim]`.

    Attributes:
        n_key_heads: heads of queries and keys; divides the value heads.
        tiled: value head h uses key head h % n_key_heads, instead of h // (n_value_heads / n_key_heads).
    """

    n_key_heads: int
    tiled: bool


@struct.dataclass
class DeltaNet:
    """Parameters of one layer, with channels = 2 · n_key_heads · key_dim + n_value_heads · value_dim.

    Attributes:
        qkv: what is convolved: queries, keys and values, `[d_model, channels]`.
        z: the gate, `[d_model, n_value_heads · value_dim]`.
        beta: how much of the correction each head stores, `[d_model, n_value_heads]`.
        alpha: how fast each head forgets, `[d_model, n_value_heads]`; with bias.
        conv: over all channels.
        a: the (negative) rates, float32.
        norm: of each head's output, `[value_dim]`.
        out: `[n_value_heads · value_dim, d_model]`.
    """

    qkv: Linear
    z: Linear
    beta: Linear
    alpha: Linear
    conv: Conv
    a: Float[Array, " n_value_heads"]
    norm: Norm
    out: Linear


def delta_net(
    p: DeltaNet, x: Float[Array, "T d_model"], state: RecurrentState, spec: DeltaNetSpec, ctx: Context
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
    n_rows, (n_heads, key_dim, value_dim) = x.shape[0], spec.ssm
    old = read_slots(state, layout)
    qkv, z, beta, alpha = linears((p.qkv, p.z, p.beta, p.alpha), x, numerics, dtype=jnp.float32)
    qkv, window = causal_conv(p.conv, qkv, old.conv, layout)
    q, k, v = jnp.split(jax.nn.silu(qkv), [spec.n_key_heads * key_dim, 2 * spec.n_key_heads * key_dim], axis=1)
    q, k = (unit(y.reshape(-1, key_dim), eps, numerics).reshape(n_rows, -1, key_dim) for y in (q, k))
    repeats = n_heads // spec.n_key_heads
    q, k = (jnp.tile(y, (1, repeats, 1)) if spec.tiled else jnp.repeat(y, repeats, axis=1) for y in (q, k))
    log_decay = (jax.nn.softplus(alpha) * p.a)[..., None]
    values = v.reshape(n_rows, n_heads, value_dim)
    rows = (q * key_dim**-0.5, k, values, log_decay, jax.nn.sigmoid(beta))
    y, ssm = delta_scan(*rows, old.ssm, layout, method=scan_method(numerics))
    y = rms_norm(p.norm, y, eps=eps, numerics=numerics).reshape(n_rows, -1) * jax.nn.silu(z)
    out = linear(p.out, y.astype(x.dtype), numerics)
    return out, write_slots(state, RecurrentState(conv=window, ssm=ssm), layout)


def unit(x: Float[Array, "rows d"], eps: float, numerics: Numerics) -> Float[Array, "rows d"]:
    """Rows of length one."""
    return x * lax.rsqrt(row_sum(x * x, numerics=numerics) + eps)


def delta_scan(
    q: Float[Array, "T n_heads key_dim"],
    k: Float[Array, "T n_heads key_dim"],
    v: Float[Array, "T n_heads value_dim"],
    log_decay: Float[Array, "T n_heads decays"],
    beta: Float[Array, "T n_heads"],
    initial: Float[Array, "S n_heads key_dim value_dim"],
    layout: RowLayout,
    *,
    method: ScanMethod,
) -> tuple[Float[Array, "T n_heads value_dim"], Float[Array, "S n_heads key_dim value_dim"]]:
    """h ← exp(log_decay) h; h ← h + k ⊗ beta (v - hᵀk); y = hᵀq, for each head.

    A head decays by one number, or each of its key channels by one of its own (Kimi Team 2025,
    https://arxiv.org/abs/2510.26692).
    `method` is as from `scan_method`.
    """

    if method == NATIVE:
        decay = jnp.exp(log_decay)
        return linear_scan(q, decay, beta[..., None] * k, v, initial, layout, read=decay * k)

    def step(h: Array, q: Array, k: Array, v: Array, log_decay: Array, beta: Array) -> tuple[Array, Array]:
        h = h * jnp.exp(log_decay)[..., None]
        stored = jnp.sum(h * k[:, :, None], axis=1)
        h = h + k[:, :, None] * (beta[:, None] * (v - stored))[:, None]
        return h, jnp.sum(h * q[:, :, None], axis=1)

    def chunk(h: Array, q: Array, k: Array, v: Array, log_decay: Array, beta: Array) -> tuple[Array, Array]:
        # Section 3.3 of the paper: what the rows of a chunk store solves one triangular system per head.
        q, k, v, log_decay, beta = (jnp.swapaxes(y, 0, 1) for y in (q, k, v, log_decay, beta))
        decay = jnp.exp(log_decay)
        if decay.shape[-1] == 1:  # one number a head decays whole products, in half the time
            between, before, after = decay_between(decay[..., 0])
            later = before * k, before * q
            read, seen = (between * product(y, jnp.swapaxes(k, 1, 2)) for y in (k, q))
            left, whole = after * k, before[:, -1:]
        else:
            pairs, late, early, whole = fading_products(jnp.stack([k, q], 1) * decay[:, None], k[:, None], decay)
            later, left, whole = (late[:, 0], late[:, 1]), early[:, 0], whole[..., None]
            own = jnp.eye(q.shape[1], dtype=q.dtype) * jnp.sum(q * k, axis=2, keepdims=True)
            read, seen = pairs[:, 0, 0], pairs[:, 1, 0] + own
        system = beta[..., None] * read  # its unit diagonal is understood
        wanted = beta[..., None] * (v - product(later[0], h))
        stored = product(inverse_of_unit_lower(system), wanted)
        y = product(later[1], h) + product(seen, stored)
        h = whole * h + product(jnp.swapaxes(left, 1, 2), stored)
        return h, jnp.swapaxes(y, 0, 1)

    return recurrence(step, chunk, initial, (q, k, v, log_decay, beta), layout, method=method)
