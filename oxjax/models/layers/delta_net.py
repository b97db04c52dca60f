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
from oxjax.models.layers.context import Context
from oxjax.models.layers.conv import Conv, causal_conv
from oxjax.models.layers.linear import Linear, linear
from oxjax.models.layers.norms import Norm, rms_norm
from oxjax.models.layers.recurrence import product, recurrence


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
    layout, exact, eps = ctx.layout, ctx.config.exact, ctx.config.norm_eps
    n_rows, (n_heads, key_dim, value_dim) = x.shape[0], spec.ssm
    old = read_slots(state, layout)
    qkv, z, beta, alpha = linear(p.qkv, p.z, p.beta, p.alpha, x=x, exact=exact, dtype=jnp.float32)
    qkv, window = causal_conv(p.conv, qkv, old.conv, layout)
    q, k, v = jnp.split(jax.nn.silu(qkv), [spec.n_key_heads * key_dim, 2 * spec.n_key_heads * key_dim], axis=1)
    q, k = (unit(y.reshape(-1, key_dim), eps, exact).reshape(n_rows, -1, key_dim) for y in (q, k))
    repeats = n_heads // spec.n_key_heads
    q, k = (jnp.tile(y, (1, repeats, 1)) if spec.tiled else jnp.repeat(y, repeats, axis=1) for y in (q, k))
    log_decay = (jax.nn.softplus(alpha) * p.a)[..., None]
    values = v.reshape(n_rows, n_heads, value_dim)
    y, ssm = delta_scan(q * key_dim**-0.5, k, values, log_decay, jax.nn.sigmoid(beta), old.ssm, layout, exact=exact)
    y = rms_norm(p.norm, y, eps=eps, exact=exact).reshape(n_rows, -1) * jax.nn.silu(z)
    out = linear(p.out, x=y.astype(x.dtype), exact=exact)[0]
    return out, write_slots(state, RecurrentState(conv=window, ssm=ssm), layout)


def unit(x: Float[Array, "rows d"], eps: float, exact: bool) -> Float[Array, "rows d"]:
    """Rows of length one."""
    return x * lax.rsqrt(row_sum(x * x, exact=exact) + eps)


def delta_scan(
    q: Float[Array, "T n_heads key_dim"],
    k: Float[Array, "T n_heads key_dim"],
    v: Float[Array, "T n_heads value_dim"],
    log_decay: Float[Array, "T n_heads decays"],
    beta: Float[Array, "T n_heads"],
    initial: Float[Array, "S n_heads key_dim value_dim"],
    layout: RowLayout,
    *,
    exact: bool,
) -> tuple[Float[Array, "T n_heads value_dim"], Float[Array, "S n_heads key_dim value_dim"]]:
    """h ← exp(log_decay) h; h ← h + k ⊗ beta (v - hᵀk); y = hᵀq, for each head.

    A head decays by one number, or each of its key channels by one of its own (Kimi Team 2025,
    https://arxiv.org/abs/2510.26692).
    """

    def step(h: Array, q: Array, k: Array, v: Array, log_decay: Array, beta: Array) -> tuple[Array, Array]:
        h = h * jnp.exp(log_decay)[..., None]
        stored = jnp.sum(h * k[:, :, None], axis=1)
        h = h + k[:, :, None] * (beta[:, None] * (v - stored))[:, None]
        return h, jnp.sum(h * q[:, :, None], axis=1)

    def chunk(h: Array, q: Array, k: Array, v: Array, log_decay: Array, beta: Array) -> tuple[Array, Array]:
        # Section 3.3 of the paper: what the rows of a chunk store solves one triangular system per head.
        q, k, v, log_decay, beta = (jnp.swapaxes(y, 0, 1) for y in (q, k, v, log_decay, beta))
        since = jnp.cumsum(log_decay, axis=1)
        before = jnp.exp(since)
        system = beta[..., None] * _decayed_products(k, k, since)  # its unit diagonal is understood
        wanted = beta[..., None] * (v - product(before * k, h))
        stored = product(_inverse_of_unit_lower(system), wanted)
        y = product(before * q, h) + product(_decayed_products(q, k, since), stored)
        left = jnp.exp(since[:, -1:] - since) * k
        h = before[:, -1, :, None] * h + product(jnp.swapaxes(left, 1, 2), stored)
        return h, jnp.swapaxes(y, 0, 1)

    return recurrence(step, None if exact else chunk, initial, (q, k, v, log_decay, beta), layout)


def _decayed_products(
    a: Float[Array, "n_heads size key_dim"],
    b: Float[Array, "n_heads size key_dim"],
    since: Float[Array, "n_heads size decays"],
) -> Float[Array, "n_heads size size"]:
    """Products of each row of a with the rows of b up to it, every channel decayed by exp(since_a - since_b) ≤ 1.

    exp(since_a) and exp(-since_b) apart would leave the range of float32. From the boundary between two blocks of
    rows on neither exceeds one, so what lies below the diagonal is, from blocks of one row up, nothing but products.
    """
    if since.shape[-1] == 1:  # one number a head decays whole products, in half the time
        pairs = jnp.tril(jnp.ones((since.shape[1], since.shape[1]), bool))
        decay = jnp.exp(jnp.where(pairs, since - jnp.swapaxes(since, 1, 2), -jnp.inf))
        return decay * product(a, jnp.swapaxes(b, 1, 2))

    def blocks(y: Array, width: int) -> Array:
        return y.reshape(y.shape[0], -1, width, y.shape[-1])

    found = blocks(jnp.sum(a * b, axis=-1, keepdims=True), 1)
    while (width := found.shape[-1]) < a.shape[-2]:
        a_rows, b_rows, since_rows = (blocks(y, width) for y in (a, b, since))
        boundary = since_rows[:, 0::2, -1:]
        late = a_rows[:, 1::2] * jnp.exp(since_rows[:, 1::2] - boundary)
        early = b_rows[:, 0::2] * jnp.exp(boundary - since_rows[:, 0::2])
        corner = product(late, jnp.swapaxes(early, 2, 3))
        found = _joined(found[:, 0::2], corner, found[:, 1::2])
    return found[:, 0]


def _joined(
    a: Float[Array, "*n width width"], corner: Float[Array, "*n width width"], b: Float[Array, "*n width width"]
) -> Float[Array, "*n 2*width 2*width"]:
    """[[a, 0], [corner, b]]."""
    top = jnp.concatenate([a, jnp.zeros_like(a)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([corner, b], axis=-1)], axis=-2)


def _inverse_of_unit_lower(lower: Float[Array, "n_heads size size"]) -> Float[Array, "n_heads size size"]:
    """Inverses of matrices with these numbers below a diagonal of ones; the size is a power of two.

    The inverse of [[a, 0], [c, b]] is [[a⁻¹, 0], [-b⁻¹ c a⁻¹, b⁻¹]], from blocks of one number up. Unlike a product
    of powers it never holds numbers larger than the answer's, and unlike LAPACK's solver, which takes up to
    sixty times longer while other programs run, it is nothing but matrix products.
    """
    n_heads, size, _ = lower.shape
    inverse = jnp.ones((n_heads, size, 1, 1), lower.dtype)
    while (width := inverse.shape[-1]) < size:
        corners = [lower[:, at + width : at + 2 * width, at : at + width] for at in range(0, size, 2 * width)]
        a, b = inverse[:, 0::2], inverse[:, 1::2]
        corner = -product(product(b, jnp.stack(corners, axis=1)), a)
        inverse = _joined(a, corner, b)
    return inverse[:, 0]
