"""Causal attention of flat rows over paged latents, whose keys and values are written out a block at a time.

Sequence by sequence and block by block, every latent is multiplied out once for all rows that see it. The arithmetic of
a row and a key is a fraction of `paged_attention`'s on the latents themselves, for the price of that product.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from oxjax.batch import RowLayout
from oxjax.kernels.loops import bounded_loop
from oxjax.kernels.numerics import KV_BLOCK
from oxjax.kernels.online_softmax import Sums, add_block, batched_dot, no_sums, with_ones
from oxjax.kernels.paged_attention import whole_blocks

Q_TILE = 128  # rows


def expanding_pays(layout: RowLayout, *, rank: int, nope_dim: int, rope_dim: int, value_dim: int) -> Bool[Array, ""]:
    """The expanded form takes fewer multiplications for this batch than attention over the latents.

    For `rows` of a sequence of `context` tokens these are, for each head, over the latents
    rows · context · (2 rank + rope_dim) + rows · rank · (nope_dim + value_dim), and written out
    rows · context · (nope_dim + rope_dim + value_dim) + context · rank · (nope_dim + value_dim), in whole tiles and
    blocks.
    """
    rows = layout.ends - layout.starts
    context = jnp.where(rows > 0, layout.positions[jnp.maximum(layout.ends - 1, 0)] + 1, 0)
    whole = -(-rows // Q_TILE) * Q_TILE, -(-context // KV_BLOCK) * KV_BLOCK
    rows, context, tiles, blocks = (n.astype(jnp.float32) for n in (rows, context, *whole))
    given = rank * (nope_dim + value_dim)
    absorbed = rows * context * (2 * rank + rope_dim) + rows * given
    return jnp.sum(tiles * blocks * (nope_dim + rope_dim + value_dim) + blocks * given) < jnp.sum(absorbed)


def expanded_attention(
    q: Float[Array, "T n_heads key_dim"],
    latent_pages: Float[Array, "pages page_size rank"],
    rope_pages: Float[Array, "pages page_size rope_dim"],
    k_up: Float[Array, "n_heads nope_dim rank"],
    v_up: Float[Array, "n_heads rank value_dim"],
    layout: RowLayout,
    *,
    scale: float,
) -> Float[Array, "T n_heads value_dim"]:
    """softmax(scale · q kᵀ, causal) v for rows whose own latents are already in the pages.

    Args:
        q: queries; of key_dim = nope_dim + rope_dim the last are rotated.
        latent_pages: what keys and values come from.
        rope_pages: the rotated dimensions of the keys, which all heads share.
        k_up, v_up: from a key to its latent, transposed, and from the latent to a value.
        layout: of the batch.
        scale: multiplier of the scores.
    """
    n_rows, n_heads, _ = q.shape
    value_dim = v_up.shape[2]
    padded = jnp.pad(q, ((0, Q_TILE), (0, 0), (0, 0))).swapaxes(0, 1)[None]
    positions = jnp.pad(layout.positions, (0, Q_TILE))
    tables = whole_blocks(layout.tile_tables, latent_pages.shape[1])

    def one_sequence(seq: Array, sums: Sums) -> Sums:
        start, end = layout.starts[seq], layout.ends[seq]
        context = jnp.where(end > start, layout.positions[jnp.maximum(end - 1, 0)] + 1, 0)
        table = tables[layout.row_tile[jnp.minimum(start, n_rows - 1)]]

        def one_block(block: Array, sums: Sums) -> Sums:
            keys = block * KV_BLOCK + jnp.arange(KV_BLOCK, dtype=jnp.int32)
            latent, rope_k = (p[table[block]].reshape(KV_BLOCK, -1) for p in (latent_pages, rope_pages))
            # Rows past a sequence's end may hold anything, NaN included: values are zeroed, scores masked.
            latent = jnp.where((keys < context)[:, None], latent, jnp.zeros((), latent.dtype))[None, None]
            latent = jnp.broadcast_to(latent, (1, n_heads, *latent.shape[2:]))
            k = batched_dot(latent, k_up[None], contract=3).astype(q.dtype)
            k = jnp.concatenate([k, jnp.broadcast_to(rope_k, (*k.shape[:3], rope_k.shape[1]))], axis=-1)
            v = with_ones(batched_dot(latent, v_up[None], contract=2).astype(q.dtype))

            def one_tile(tile: Array, sums: Sums) -> Sums:
                first = start + tile * Q_TILE
                queries, best, total = (lax.dynamic_slice_in_dim(a, first, Q_TILE, 2) for a in (padded, *sums))
                rows = first + jnp.arange(Q_TILE, dtype=jnp.int32)
                seen = keys <= lax.dynamic_slice_in_dim(positions, first, Q_TILE)[:, None]
                scores = batched_dot(queries, k, contract=3) * scale
                new = add_block((best, total), scores, seen & (rows < end)[:, None], v)
                # Rows past the sequence's end keep their sums: they are of sequences to come.
                best, total = (lax.dynamic_update_slice_in_dim(a, n, first, 2) for a, n in zip(sums, new, strict=True))
                return best, total

            # The sequence's rows before the block see nothing of it.
            before = block * KV_BLOCK - (context - (end - start))
            first_tile, end_tile = jnp.maximum(before, 0) // Q_TILE, -((start - end) // Q_TILE)
            return bounded_loop(first_tile, end_tile, -(-n_rows // Q_TILE), one_tile, sums)

        return bounded_loop(0, -(-context // KV_BLOCK), tables.shape[1], one_block, sums)

    sums = no_sums(1, n_heads, n_rows + Q_TILE, value_dim=value_dim)
    _, total = lax.fori_loop(0, layout.starts.shape[0], one_sequence, sums)
    total = total[0, :, :n_rows].swapaxes(0, 1)
    values, denominator = total[..., :-1], total[..., -1:]
    return (values / jnp.where(denominator == 0.0, 1.0, denominator)).astype(q.dtype)
