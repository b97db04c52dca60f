"""Multi-head attention with grouped keys and values over pages."""

from __future__ import annotations

from flax import struct
from jaxtyping import Array, Float

from oxjax.cache.pages import KVPages, write_rows
from oxjax.config import AttentionSpec
from oxjax.kernels.paged_attention import paged_attention
from oxjax.models.layers.context import Context
from oxjax.models.layers.linear import Linear, linear
from oxjax.models.layers.norms import Norm, head_rms_norm
from oxjax.models.layers.rope import apply_rope


@struct.dataclass
class Attention:
    """Projections of one layer; QK-norms `[key_dim]` where the architecture has them."""

    q: Linear
    k: Linear
    v: Linear
    out: Linear
    q_norm: Norm | None = None
    k_norm: Norm | None = None


def attention(
    p: Attention,
    x: Float[Array, "T d_model"],
    pages: KVPages,
    spec: AttentionSpec,
    ctx: Context,
) -> tuple[Float[Array, "T d_model"], KVPages]:
    """Project, normalise, rotate, write keys and values to the pages, attend, project back.

    Args:
        p: the layer's parameters.
        x: normalised residual rows.
        pages: the layer's pages; the new ones are returned.
        spec: the layer's static facts.
        ctx: the step's.
    """
    layout, config = ctx.layout, ctx.config
    q, k, v = (
        y.reshape(x.shape[0], heads, -1)
        for y, heads in zip(
            linear(p.q, p.k, p.v, x=x, exact=config.exact),
            (spec.n_heads, spec.n_kv_heads, spec.n_kv_heads),
            strict=True,
        )
    )
    if p.q_norm is not None:
        q = head_rms_norm(p.q_norm, q, eps=config.norm_eps, exact=config.exact)
    if p.k_norm is not None:
        k = head_rms_norm(p.k_norm, k, eps=config.norm_eps, exact=config.exact)
    if spec.rope is not None:
        q, k = (apply_rope(y, ctx.angles[spec.rope], config.ropes[spec.rope]) for y in (q, k))
    pages = write_rows(pages, k, v, layout.write_page, layout.write_offset)
    mixed = paged_attention(q, pages.k, pages.v, layout, scale=spec.scale, window=spec.window, softcap=spec.softcap)
    return linear(p.out, x=mixed.reshape(x.shape[0], -1), exact=config.exact)[0], pages
