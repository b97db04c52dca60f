"""The demo models: a Llama-shaped decoder (RMS norm, grouped heads, interleaved RoPE, SwiGLU, tied output).

Parameters carry the names and the [out, in] orientation of the GGUF tensors they become, so export copies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

Params = dict[str, jax.Array]


@dataclass(frozen=True)
class Shape:
    """Sizes of a demo model; every row length (d_model, d_ff, head widths) is a multiple of 32 for Q8_0."""

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    vocab: int = 2048
    context: int = 512
    rope_theta: float = 10000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


MAIN = Shape(d_model=192, n_layers=4, n_heads=6, n_kv_heads=2, d_ff=512)
DRAFT = Shape(d_model=64, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=192)


def init(shape: Shape, seed: int) -> Params:
    """Normal(0, 0.02) matrices, projections into the residual stream scaled down by sqrt(2 layers); ones for norms."""
    d, kv = shape.d_model, shape.n_kv_heads * shape.head_dim
    sizes = {"token_embd": (shape.vocab, d)}
    for i in range(shape.n_layers):
        sizes |= {f"blk.{i}.attn_q": (d, d), f"blk.{i}.attn_k": (kv, d), f"blk.{i}.attn_v": (kv, d)}
        sizes |= {f"blk.{i}.attn_output": (d, d), f"blk.{i}.ffn_gate": (shape.d_ff, d)}
        sizes |= {f"blk.{i}.ffn_up": (shape.d_ff, d), f"blk.{i}.ffn_down": (d, shape.d_ff)}
    keys = jax.random.split(jax.random.key(seed), len(sizes))
    residual = 1 / math.sqrt(2 * shape.n_layers)
    params = {
        f"{name}.weight": 0.02 * (residual if name.endswith(("output", "down")) else 1) * jax.random.normal(key, size)
        for key, (name, size) in zip(keys, sizes.items(), strict=True)
    }
    norms = [f"blk.{i}.{n}_norm" for i in range(shape.n_layers) for n in ("attn", "ffn")]
    return params | {f"{name}.weight": jnp.ones(d) for name in [*norms, "output_norm"]}


def _rms(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * weight


def _rope(x: jax.Array, theta: float) -> jax.Array:
    """Rotate the pairs (x[2i], x[2i+1]) of [batch, position, heads, head_dim] by position * theta^(-2i/head_dim)."""
    dim = x.shape[-1]
    angle = jnp.arange(x.shape[1])[:, None] * theta ** (-jnp.arange(0, dim, 2) / dim)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


def _attention(p: Params, blk: str, x: jax.Array, shape: Shape) -> jax.Array:
    batch, length, _ = x.shape
    heads, kv = shape.n_heads, shape.n_kv_heads
    q = (x @ p[f"{blk}.attn_q.weight"].T).reshape(batch, length, heads, -1)
    k = (x @ p[f"{blk}.attn_k.weight"].T).reshape(batch, length, kv, -1)
    v = (x @ p[f"{blk}.attn_v.weight"].T).reshape(batch, length, kv, -1)
    q = _rope(q, shape.rope_theta).reshape(batch, length, kv, heads // kv, -1)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", q, _rope(k, shape.rope_theta)) / math.sqrt(shape.head_dim)
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e30)
    out = jnp.einsum("bkgqs,bskd->bqkgd", jax.nn.softmax(scores, axis=-1), v)
    return out.reshape(batch, length, -1) @ p[f"{blk}.attn_output.weight"].T


def logits(p: Params, tokens: jax.Array, shape: Shape) -> jax.Array:
    """Next-token logits [batch, position, vocab] of token ids [batch, position]."""
    x = p["token_embd.weight"][tokens]
    for i in range(shape.n_layers):
        blk = f"blk.{i}"
        x = x + _attention(p, blk, _rms(x, p[f"{blk}.attn_norm.weight"], shape.eps), shape)
        h = _rms(x, p[f"{blk}.ffn_norm.weight"], shape.eps)
        gated = jax.nn.silu(h @ p[f"{blk}.ffn_gate.weight"].T) * (h @ p[f"{blk}.ffn_up.weight"].T)
        x = x + gated @ p[f"{blk}.ffn_down.weight"].T
    return _rms(x, p["output_norm.weight"], shape.eps) @ p["token_embd.weight"].T


def losses(p: Params, tokens: jax.Array, shape: Shape) -> jax.Array:
    """Cross-entropy in nats of tokens[:, 1:] given what stands before them, [batch, position - 1]."""
    logp = jax.nn.log_softmax(logits(p, tokens[:, :-1], shape))
    return -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]
