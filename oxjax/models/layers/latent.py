"""Multi-head latent attention: heads whose keys and values all come from one narrow latent per position.

DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1. Pages hold the latent and the rotated key. In the absorbed
form the matrices that lead from the latent to keys and values are applied to queries and outputs instead, so attention
is over one key head, `[latent | rotated]`, whose values are the latent; exact mode knows no other. In the expanded form
keys and values are written out.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float

from oxjax.cache.pages import LatentPages, write_rows
from oxjax.config import LatentSpec
from oxjax.kernels.dot import dot_heads
from oxjax.kernels.expanded_attention import Q_TILE, expanded_attention, expanding_pays
from oxjax.kernels.paged_attention import paged_attention
from oxjax.models.layers.attention import growth
from oxjax.models.layers.context import Context
from oxjax.models.layers.linear import Linear, linear, linears
from oxjax.models.layers.norms import Norm, rms_norm
from oxjax.models.layers.rope import apply_rope


@struct.dataclass
class LatentAttention:
    """Projections of one layer.

    Attributes:
        q: to all heads' queries, from the residual rows or from `q_low`'s.
        kv_low: to the latent and the shared key before its rotation.
        kv_norm: of the latent.
        k_up: from a head's unrotated query to the latent.
        v_up: from the latent to a head's value.
        out: back to the residual stream.
        q_low: to the queries' low rank, where they have one.
        q_norm: of that.
    """

    q: Linear
    kv_low: Linear
    kv_norm: Norm
    k_up: Float[Array, "heads nope_dim kv_rank"]
    v_up: Float[Array, "heads kv_rank value_dim"]
    out: Linear
    q_low: Linear | None = None
    q_norm: Norm | None = None


def latent_attention(
    p: LatentAttention,
    x: Float[Array, "T d_model"],
    pages: LatentPages,
    spec: LatentSpec,
    ctx: Context,
) -> tuple[Float[Array, "T d_model"], LatentPages]:
    """Project, normalise, rotate, write the latent to the pages, attend, project back.

    Args:
        p: the layer's parameters.
        x: normalised residual rows.
        pages: the layer's pages; the new ones are returned.
        spec: the layer's static facts.
        ctx: the step's.
    """
    layout, config = ctx.layout, ctx.config
    norm = {"eps": config.norm_eps, "numerics": config.numerics}
    if p.q_low is None:
        q, low = linears((p.q, p.kv_low), x, config.numerics)
    else:
        q_low, low = linears((p.q_low, p.kv_low), x, config.numerics)
        q = linear(p.q, rms_norm(p.q_norm, q_low, **norm), config.numerics)
    q = q.reshape(x.shape[0], spec.n_heads, -1)
    q_rope, rope_k = q[..., spec.nope_dim :], low[:, None, spec.kv_rank :]
    if spec.rope is not None:
        angles, rope = ctx.angles[spec.rope], config.ropes[spec.rope]
        q_rope, rope_k = (apply_rope(y, angles, rope, config.numerics) for y in (q_rope, rope_k))
    latent = rms_norm(p.kv_norm, low[:, : spec.kv_rank], **norm)
    pages = write_rows(pages, latent, rope_k[:, 0], page=layout.write_page, offset=layout.write_offset)
    q = q[..., : spec.nope_dim], q_rope
    if config.numerics.exact or x.shape[0] < Q_TILE:
        values = _absorbed(p, *q, pages, spec, ctx)
    else:
        dims = {"nope_dim": spec.nope_dim, "rope_dim": spec.rope_dim, "value_dim": spec.value_dim}
        values = lax.cond(
            expanding_pays(layout, rank=spec.kv_rank, **dims),
            lambda: _expanded(p, *q, pages, spec, ctx),
            lambda: _absorbed(p, *q, pages, spec, ctx),
        )
    return linear(p.out, values.reshape(x.shape[0], -1), config.numerics), pages


def _absorbed(
    p: LatentAttention,
    q_nope: Float[Array, "T heads nope_dim"],
    q_rope: Float[Array, "T heads rope_dim"],
    pages: LatentPages,
    spec: LatentSpec,
    ctx: Context,
) -> Float[Array, "T heads value_dim"]:
    numerics, dtype = ctx.config.numerics, q_nope.dtype
    q = jnp.concatenate([dot_heads(q_nope, p.k_up, numerics=numerics).astype(dtype), q_rope], axis=-1)
    q = _grown(q, spec, ctx)
    latent_pages, rope_pages = (a[:, :, None] for a in (pages.latent, pages.rope_k))
    mixed = paged_attention(
        q, latent_pages, latent_pages, ctx.layout, numerics=numerics, scale=spec.scale, more_k_pages=rope_pages
    )
    return dot_heads(mixed, p.v_up, numerics=numerics).astype(dtype)


def _expanded(
    p: LatentAttention,
    q_nope: Float[Array, "T heads nope_dim"],
    q_rope: Float[Array, "T heads rope_dim"],
    pages: LatentPages,
    spec: LatentSpec,
    ctx: Context,
) -> Float[Array, "T heads value_dim"]:
    q = _grown(jnp.concatenate([q_nope, q_rope], axis=-1), spec, ctx)
    return expanded_attention(q, pages.latent, pages.rope_k, p.k_up, p.v_up, ctx.layout, scale=spec.scale)


def _grown(q: Float[Array, "T heads key_dim"], spec: LatentSpec, ctx: Context) -> Float[Array, "T heads key_dim"]:
    if spec.temperature is None:
        return q
    return q * growth(spec.temperature, ctx.layout.positions).astype(q.dtype)
