"""Causal attention of flat rows over paged keys and values, with an online softmax.

Queries come in tiles of one sequence, keys in blocks of `KV_BLOCK` tokens counted from position 0 whatever
the page size, so every row meets the same products in the same order however it was batched; a fully masked
block changes no bit. The native kernel cuts keys alike, and queries as it likes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from oxjax.batch import RowLayout
from oxjax.kernels.loops import bounded_loop
from oxjax.kernels.native import ffi_call
from oxjax.kernels.numerics import KV_BLOCK, Numerics
from oxjax.kernels.online_softmax import Sums, add_block, batched_dot, no_sums, with_ones

EXACT_Q_TILE = 8
FAST_Q_TILE = 32


def q_tile_rows(n_rows: int, n_seqs: int, numerics: Numerics) -> int:
    """Rows of a query tile: one constant in exact mode, else 1 where every sequence has about one row."""
    if numerics.exact:
        return EXACT_Q_TILE
    return 1 if n_rows <= n_seqs else FAST_Q_TILE


def paged_attention(
    q: Float[Array, "T n_heads key_dim"],
    k_pages: Float[Array, "pages page_size n_kv_heads _"],
    v_pages: Float[Array, "pages page_size n_kv_heads value_dim"],
    layout: RowLayout,
    *,
    numerics: Numerics,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    slopes: Float[np.ndarray, " n_heads"] | None = None,
    sinks: Float[Array, " n_heads"] | None = None,
    more_k_pages: Float[Array, "pages page_size n_kv_heads more"] | None = None,
) -> Float[Array, "T n_heads value_dim"]:
    """softmax(scale · q kᵀ, causal) v for rows whose own keys and values are already in the pages.

    Args:
        q: queries after RoPE. Query head `h` reads key head `h // (n_heads // n_kv_heads)`.
        k_pages, v_pages: this layer's keys and values.
        layout: tiles and block tables of the batch.
        numerics: see `Numerics`; activations play no part.
        scale: multiplier of the scores.
        window: a query sees the last `window` positions, itself included; None sees all.
        chunk: a query sees from the last multiple of `chunk` on; None sees all. Not both.
        softcap: scores become `c · tanh(s / c)` before the mask.
        slopes: what each head's scores lose per position of distance (ALiBi).
        sinks: a logit of each head that takes its share of the softmax and gives nothing.
        more_k_pages: the last dimensions of the keys, where `k_pages` has the first ones only.
    """
    if KV_BLOCK % k_pages.shape[1]:
        raise ValueError(f"page_size {k_pages.shape[1]} does not divide the attention block of {KV_BLOCK} tokens")
    keys = (k_pages,) if more_k_pages is None else (k_pages, more_k_pages)
    if numerics.native:
        none = np.zeros(0, np.float32)
        call = ffi_call("paged_attention", jax.ShapeDtypeStruct((*q.shape[:2], v_pages.shape[3]), jnp.float32))
        return call(
            q.astype(jnp.float32),
            v_pages,
            layout.block_tables,
            jnp.where(layout.is_real, layout.row_seq, -1),
            layout.positions,
            none if slopes is None else slopes.astype(np.float32),
            none if sinks is None else sinks,
            *keys,
            scale=np.float32(scale),
            window=window or 0,
            chunk=chunk or 0,
            softcap=np.float32(softcap or 0.0),
        ).astype(q.dtype)
    n_tiles, q_tile = layout.tile_rows.shape
    n_kv, value_dim = v_pages.shape[2:]
    group = q.shape[1] // n_kv
    tiles = q[layout.tile_rows].astype(k_pages.dtype).reshape(n_tiles, q_tile, n_kv, group, -1)
    tiles = tiles.transpose(0, 2, 1, 3, 4).reshape(n_tiles, n_kv, q_tile * group, -1)
    q_positions = jnp.repeat(layout.tile_positions, group, axis=1)[:, None, :, None]
    if slopes is not None:  # per row of a tile: key head, then query row, then head within the group
        by_row = np.broadcast_to(slopes.astype(np.float32).reshape(n_kv, 1, group), (n_kv, q_tile, group))
        slopes = by_row.reshape(n_kv, q_tile * group, 1)
    tables = whole_blocks(layout.tile_tables, k_pages.shape[1])

    def oldest_seen(positions: Array) -> Array:
        if window is not None:
            return positions - window + 1
        return jnp.zeros_like(positions) if chunk is None else positions // chunk * chunk

    def one_block(block: Array, sums: Sums) -> Sums:
        k, v = _read_block(keys, v_pages, tables, block, layout.tile_kv_lens)
        positions = block * KV_BLOCK + jnp.arange(KV_BLOCK, dtype=jnp.int32)
        scores = batched_dot(tiles, k, contract=3) * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        if slopes is not None:
            scores -= slopes * (q_positions - positions).astype(jnp.float32)
        visible = (positions <= q_positions) & (positions >= oldest_seen(q_positions))
        return add_block(sums, scores, visible, v)

    last = jnp.max(layout.tile_positions)
    oldest = jnp.min(jnp.where(layout.tile_positions < 0, last, layout.tile_positions))
    first = jnp.maximum(oldest_seen(oldest), 0) // KV_BLOCK
    empty = no_sums(n_tiles, n_kv, q_tile * group, value_dim=value_dim)
    best, total = bounded_loop(first, last // KV_BLOCK + 1, tables.shape[1], one_block, empty)
    values, denominator = total[..., :-1], total[..., -1:]
    if sinks is not None:
        sink = jnp.tile(sinks.reshape(n_kv, group), (1, q_tile))[..., None]
        values, denominator = _with_sink(values, denominator, best, sink)
    out = values / jnp.where(denominator == 0.0, 1.0, denominator)
    out = out.reshape(n_tiles, n_kv, q_tile, group, value_dim).transpose(0, 2, 1, 3, 4)
    out = out.reshape(n_tiles, q_tile, n_kv * group, value_dim)
    return out[layout.row_tile, layout.row_place].astype(q.dtype)


def whole_blocks(tables: Array, page_size: int) -> Array:
    """Block tables cut into `[tiles, blocks, pages per block]`, padded with the null page."""
    per_block = KV_BLOCK // page_size
    padded = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % per_block)))
    return padded.reshape(tables.shape[0], -1, per_block)


def _with_sink(values: Array, denominator: Array, best: Array, sink: Array) -> tuple[Array, Array]:
    """Both sums of a softmax once a score without a value joins it, relative to the new largest score."""
    new_best = jnp.maximum(best, sink)
    shrink = jnp.exp(best - new_best)
    return values * shrink, denominator * shrink + jnp.exp(sink - new_best)


def _read_block(
    keys: tuple[Array, ...], v_pages: Array, tables: Array, block: Array, kv_lens: Array
) -> tuple[Array, Array]:
    """Keys `[tiles, n_kv, KV_BLOCK, key_dim]` of one block, and values with a column of ones beside them.

    Rows past a sequence's length may hold anything, NaN included: their values are zeroed here, their
    scores masked by the caller.
    """
    ids = lax.dynamic_index_in_dim(tables, block, axis=1, keepdims=False)
    *k, v = (p[ids].reshape(ids.shape[0], KV_BLOCK, *p.shape[2:]).swapaxes(1, 2) for p in (*keys, v_pages))
    positions = block * KV_BLOCK + jnp.arange(KV_BLOCK, dtype=jnp.int32)
    written = (positions < kv_lens[:, None])[:, None, :, None]
    v = jnp.where(written, v, jnp.zeros((), v.dtype))
    k = k[0] if len(k) == 1 else jnp.concatenate(k, axis=-1)
    return k, with_ones(v)
