"""RWKV-7's time mixing: a state that rewrites itself (Peng et al. 2025, https://arxiv.org/abs/2503.14456)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from oxjax.batch import RowLayout
from oxjax.config import DTYPES, RecurrentSpec
from oxjax.kernels.dot import row_sum
from oxjax.kernels.linear_scan import linear_scan
from oxjax.models.layers.chunks import fading_products, inverse_of_unit_lower, product
from oxjax.models.layers.context import Context
from oxjax.models.layers.linear import Linear, linear
from oxjax.models.layers.norms import Norm
from oxjax.models.layers.recurrence import NATIVE, ScanMethod, recurrence, scan_method
from oxjax.models.layers.rwkv6 import normed_heads


@dataclass(frozen=True)
class Rwkv7Spec(RecurrentSpec):
    """Its static facts; a sequence's state is `[n_heads, head_dim, head_dim]`, keys by values.

    Attributes:
        first: whether this is the first layer, whose values the others mix with their own.
        decay_rank, rate_rank, mix_rank: widths of the narrow maps that these come from.
        gate_rank: the same for gates; 0 without gates.
    """

    first: bool
    decay_rank: int
    rate_rank: int
    mix_rank: int
    gate_rank: int


@struct.dataclass
class TimeMix7:
    """Parameters of one layer. What is read is x + (the row before - x) · share, with a share per channel.

    Pairs are a narrow map and one back with bias, `[d_model, rank]` and `[rank, d_model]`.

    Attributes:
        shares: of receptances, decays, keys, values, rates and gates, in this order; gates may be missing.
        receptance, key, value, out: `[d_model, d_model]`.
        decay: how fast channels fade, a pair.
        rate: how much of what a key stands for is replaced, a pair.
        mix: how much of the first layer's values is taken, a pair; None on the first layer.
        gate: a pair, without bias; None without gates.
        key_scale: of the keys that are replaced.
        key_rate: how much the rate scales the keys that are stored.
        bonus: weight of a row's own key and value.
        head_norm: layer norm of each head's output, for all heads; None without.
    """

    shares: Float[Array, "n_shares d_model"]
    receptance: Linear
    key: Linear
    value: Linear
    out: Linear
    decay: tuple[Linear, Linear]
    rate: tuple[Linear, Linear]
    key_scale: Float[Array, " d_model"]
    key_rate: Float[Array, " d_model"]
    bonus: Float[Array, " d_model"]
    mix: tuple[Linear, Linear] | None = None
    gate: tuple[Linear, Linear] | None = None
    head_norm: Norm | None = None


def time_mix7(
    p: TimeMix7,
    x: Float[Array, "T d_model"],
    before: Float[Array, "T d_model"],
    first_value: Float[Array, "T _"],
    ssm: Float[Array, "S n_heads head_dim head_dim"],
    spec: Rwkv7Spec,
    ctx: Context,
) -> tuple[Float[Array, "T d_model"], Float[Array, "T d_model"], Float[Array, "S n_heads head_dim head_dim"]]:
    """Shift, project, scan, normalise, gate, project back. All but the projections is float32.

    Args:
        p: the layer's parameters.
        x: normalised residual rows, float32.
        before: the row before each, zeros where a sequence begins.
        first_value: the first layer's values; none on the first layer itself.
        ssm: states that the sequences go on from.
        spec: the layer's static facts.
        ctx: the step's.

    Returns:
        float32 rows for the residual stream, the first layer's values, and the states after each sequence's rows.
    """
    numerics, (n_heads, head_dim, _) = ctx.config.numerics, spec.ssm
    dtype, n_rows = DTYPES[ctx.config.dtype], x.shape[0]

    def project(y: Array, *layers: Linear) -> Array:
        for layer in layers:
            y = linear(layer, y.astype(dtype), numerics, dtype=jnp.float32)
        return y

    def heads(y: Array) -> Array:
        return y.reshape(n_rows, n_heads, head_dim)

    def head_sum(y: Array) -> Array:
        return row_sum(y.reshape(-1, head_dim), numerics=numerics).reshape(n_rows, n_heads, 1)

    step = before - x
    for_receptance, for_decay, for_key, for_value, for_rate, *for_gate = (x + step * share for share in p.shares)
    receptance, key, value = project(for_receptance, p.receptance), project(for_key, p.key), project(for_value, p.value)
    # No channel fades faster than by exp(-exp(-0.5)) a row.
    log_decay = -math.exp(-0.5) * jax.nn.sigmoid(project(jnp.tanh(project(for_decay, p.decay[0])), p.decay[1]))
    if spec.first:
        first_value = value
    else:
        value = value + (first_value - value) * jax.nn.sigmoid(project(for_value, *p.mix))
    rate = jax.nn.sigmoid(project(for_rate, *p.rate))
    replaced = heads(key * p.key_scale)
    replaced = replaced / jnp.maximum(jnp.sqrt(head_sum(replaced * replaced)), 1e-12)
    key = key * (1.0 + (rate - 1.0) * p.key_rate)
    own = head_sum(heads(receptance * key * p.bonus))
    receptance, log_decay, key, value, rate = (heads(y) for y in (receptance, log_decay, key, value, rate))
    y, ssm = wkv7(receptance, log_decay, key, value, replaced, rate, ssm, ctx.layout, method=scan_method(numerics))
    y = normed_heads(p.head_norm, y, numerics=numerics) + (own * value).reshape(x.shape)
    if p.gate is not None:
        y = y * project(jax.nn.sigmoid(project(for_gate[0], p.gate[0])), p.gate[1])
    return project(y, p.out), first_value, ssm


def wkv7(
    receptance: Float[Array, "T n_heads key_dim"],
    log_decay: Float[Array, "T n_heads key_dim"],
    key: Float[Array, "T n_heads key_dim"],
    value: Float[Array, "T n_heads value_dim"],
    replaced: Float[Array, "T n_heads key_dim"],
    rate: Float[Array, "T n_heads key_dim"],
    initial: Float[Array, "S n_heads key_dim value_dim"],
    layout: RowLayout,
    *,
    method: ScanMethod,
) -> tuple[Float[Array, "T n_heads value_dim"], Float[Array, "S n_heads key_dim value_dim"]]:
    """h ← decay h - (rate replaced) ⊗ hᵀ replaced + k ⊗ v; y = hᵀ r, for each head; `method` as from `scan_method`."""

    if method == NATIVE:
        updates = {"read": replaced, "write": rate * replaced}
        return linear_scan(receptance, jnp.exp(log_decay), key, value, initial, layout, **updates)

    def step(
        h: Array, receptance: Array, log_decay: Array, key: Array, value: Array, replaced: Array, rate: Array
    ) -> tuple[Array, Array]:
        stored = jnp.sum(h * replaced[:, :, None], axis=1)
        h = h * jnp.exp(log_decay)[:, :, None] + key[:, :, None] * value[:, None]
        h = h - (rate * replaced)[:, :, None] * stored[:, None]
        return h, jnp.sum(h * receptance[:, :, None], axis=1)

    def chunk(
        h: Array, receptance: Array, log_decay: Array, key: Array, value: Array, replaced: Array, rate: Array
    ) -> tuple[Array, Array]:
        # As for DeltaNet, what the rows of a chunk replace solves one triangular system per head.
        receptance, log_decay, key, value, replaced, rate = (
            jnp.swapaxes(y, 0, 1) for y in (receptance, log_decay, key, value, replaced, rate)
        )
        decay, removed = jnp.exp(log_decay), -rate * replaced
        pairs, late, early, whole = fading_products(
            jnp.stack([replaced, receptance * decay], axis=1), jnp.stack([removed, key], axis=1), decay
        )
        before = product(late, h[:, None])
        stored = before[:, 0] + product(pairs[:, 0, 1], value)
        stored = product(inverse_of_unit_lower(-pairs[:, 0, 0]), stored)
        y = before[:, 1] + product(pairs[:, 1, 0], stored) + product(pairs[:, 1, 1], value)
        y = y + jnp.sum(receptance * removed, axis=2, keepdims=True) * stored
        y = y + jnp.sum(receptance * key, axis=2, keepdims=True) * value
        removed, key = jnp.swapaxes(early[:, 0], 1, 2), jnp.swapaxes(early[:, 1], 1, 2)
        h = whole[..., None] * h + product(removed, stored) + product(key, value)
        return h, jnp.swapaxes(y, 0, 1)

    rows = (receptance, log_decay, key, value, replaced, rate)
    return recurrence(step, chunk, initial, rows, layout, method=method)
