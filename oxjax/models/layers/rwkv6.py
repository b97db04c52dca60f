"""RWKV-6's time mixing (Peng et al. 2024, https://arxiv.org/abs/2404.05892), and the form that took Qwen's place."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from oxjax.batch import RowLayout
from oxjax.config import DTYPES, RecurrentSpec
from oxjax.kernels.linear_scan import linear_scan
from oxjax.kernels.numerics import Numerics
from oxjax.models.layers.chunks import fading_products, product
from oxjax.models.layers.context import Context
from oxjax.models.layers.linear import Linear, linear
from oxjax.models.layers.norms import Norm, layer_norm
from oxjax.models.layers.recurrence import NATIVE, ScanMethod, recurrence, scan_method

HEAD_NORM_EPS = 64e-5  # of the norm of each head's output


@dataclass(frozen=True)
class Rwkv6Spec(RecurrentSpec):
    """Its static facts; a sequence's state is `[n_heads, head_dim, head_dim]`, keys by values.

    Attributes:
        n_kv_heads: heads of keys and values; divides the heads.
        mix_rank: width of the projection that the data's part of a share comes from.
        decay_rank: width of the projection that decays come from.
        scale: what the block multiplies its residual rows with at its end.
    """

    n_kv_heads: int
    mix_rank: int
    decay_rank: int
    scale: float = 1.0


@struct.dataclass
class TimeMix6:
    """Parameters of one layer. What is read is x + (the row before - x) · share, with a share per channel.

    Attributes:
        share: what the shares themselves are made from.
        shares: of decays, keys, values, receptances and gates, in this order, before the data's part is added.
        low: the data's part, `[d_model, 5 · rank]`.
        up: back to the shares, five of `[rank, d_model]`.
        decay_low, decay: how fast channels fade, `[d_model, rank]` and `[rank, d_model]` with bias.
        key, value: `[d_model, n_kv_heads · head_dim]`.
        receptance, gate, out: `[d_model, d_model]`.
        bonus: weight of a row's own key and value; None for linear attention that sees its state after the row.
        head_norm: layer norm of each head's output, for all heads; None without.
    """

    share: Float[Array, " d_model"]
    shares: Float[Array, "5 d_model"]
    low: Linear
    up: tuple[Linear, ...]
    decay_low: Linear
    decay: Linear
    key: Linear
    value: Linear
    receptance: Linear
    gate: Linear
    out: Linear
    bonus: Float[Array, "n_heads head_dim"] | None = None
    head_norm: Norm | None = None


def time_mix6(
    p: TimeMix6,
    x: Float[Array, "T d_model"],
    before: Float[Array, "T d_model"],
    ssm: Float[Array, "S n_heads head_dim head_dim"],
    spec: Rwkv6Spec,
    ctx: Context,
) -> tuple[Float[Array, "T d_model"], Float[Array, "S n_heads head_dim head_dim"]]:
    """Shift, project, scan, normalise, gate, project back. All but the projections is float32.

    Args:
        p: the layer's parameters.
        x: normalised residual rows, float32.
        before: the row before each, zeros where a sequence begins.
        ssm: states that the sequences go on from.
        spec: the layer's static facts.
        ctx: the step's.

    Returns:
        float32 rows for the residual stream, and the states after each sequence's rows.
    """
    numerics, (n_heads, head_dim, _) = ctx.config.numerics, spec.ssm
    dtype, n_rows = DTYPES[ctx.config.dtype], x.shape[0]

    def project(y: Array, *layers: Linear) -> Array:
        for layer in layers:
            y = linear(layer, y.astype(dtype), numerics, dtype=jnp.float32)
        return y

    step = before - x
    low = jnp.split(jnp.tanh(project(x + step * p.share, p.low)), 5, axis=1)
    shares = (share + project(y, up) for share, y, up in zip(p.shares, low, p.up, strict=True))
    for_decay, for_key, for_value, for_receptance, for_gate = (x + step * share for share in shares)
    log_decay = -jnp.exp(project(jnp.tanh(project(for_decay, p.decay_low)), p.decay))
    receptance = project(for_receptance, p.receptance)
    receptance, log_decay = (y.reshape(n_rows, n_heads, head_dim) for y in (receptance, log_decay))
    key, value = (
        jnp.repeat(project(y, layer).reshape(n_rows, spec.n_kv_heads, head_dim), n_heads // spec.n_kv_heads, axis=1)
        for y, layer in ((for_key, p.key), (for_value, p.value))
    )
    if p.bonus is None:
        gate = jax.nn.sigmoid(project(for_gate, p.gate))
        receptance, key = receptance * head_dim**-0.5, key * (1.0 - jnp.exp(log_decay))
    else:
        gate = jax.nn.silu(project(for_gate, p.gate))
    y, ssm = wkv6(p.bonus, receptance, log_decay, key, value, ssm, ctx.layout, method=scan_method(numerics))
    return project(normed_heads(p.head_norm, y, numerics=numerics) * gate, p.out), ssm


def normed_heads(
    p: Norm | None, y: Float[Array, "T n_heads head_dim"], *, numerics: Numerics
) -> Float[Array, "T n_heads*head_dim"]:
    """Each head's output normalised on its own, with weights `[d_model]`, and all side by side."""
    flat = y.reshape(y.shape[0], -1)
    if p is None:
        return flat
    return layer_norm(Norm(), y, eps=HEAD_NORM_EPS, numerics=numerics).reshape(flat.shape) * p.weight + p.bias


def wkv6(
    bonus: Float[Array, "n_heads key_dim"] | None,
    receptance: Float[Array, "T n_heads key_dim"],
    log_decay: Float[Array, "T n_heads key_dim"],
    key: Float[Array, "T n_heads key_dim"],
    value: Float[Array, "T n_heads value_dim"],
    initial: Float[Array, "S n_heads key_dim value_dim"],
    layout: RowLayout,
    *,
    method: ScanMethod,
) -> tuple[Float[Array, "T n_heads value_dim"], Float[Array, "S n_heads key_dim value_dim"]]:
    """y = (h + (bonus k) ⊗ v)ᵀ r, then h ← decay h + k ⊗ v, for each head; without a bonus y = hᵀ r comes after.

    `method` is as from `scan_method`.
    """

    if method == NATIVE:
        return linear_scan(receptance, jnp.exp(log_decay), key, value, initial, layout, bonus=bonus)

    def step(h: Array, receptance: Array, log_decay: Array, key: Array, value: Array) -> tuple[Array, Array]:
        stored = key[:, :, None] * value[:, None]
        new = h * jnp.exp(log_decay)[:, :, None] + stored
        seen = new if bonus is None else h + bonus[:, :, None] * stored
        return new, jnp.sum(seen * receptance[:, :, None], axis=1)

    def chunk(h: Array, receptance: Array, log_decay: Array, key: Array, value: Array) -> tuple[Array, Array]:
        # Gated linear attention in chunks (https://arxiv.org/abs/2312.06635, section 4.2).
        receptance, log_decay, key, value = (jnp.swapaxes(y, 0, 1) for y in (receptance, log_decay, key, value))
        decay = jnp.exp(log_decay)
        own = key if bonus is None else bonus[:, None] * key
        seeing = receptance * decay if bonus is None else receptance
        pairs, late, early, whole = fading_products(seeing[:, None], key[:, None], decay)
        y = product(late[:, 0], h) + product(pairs[:, 0, 0], value)
        y = y + jnp.sum(receptance * own, axis=2, keepdims=True) * value
        h = whole[..., None] * h + product(jnp.swapaxes(early[:, 0], 1, 2), value)
        return h, jnp.swapaxes(y, 0, 1)

    return recurrence(step, chunk, initial, (receptance, log_decay, key, value), layout, method=method)
