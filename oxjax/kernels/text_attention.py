"""Attention of whole texts in both directions: every row of a text sees all of its rows, before and after it.

As in `paged_attention`, queries come in tiles of one text and keys in blocks of `KV_BLOCK` rows counted from the
text's first. A fixed number of tiles is processed at a time, so memory never grows with the square of a text, and every
row meets the same products in the same order, whatever else is in the batch.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from oxjax.kernels.loops import bounded_loop
from oxjax.kernels.numerics import KV_BLOCK
from oxjax.kernels.online_softmax import Sums, add_block, batched_dot, no_sums, with_ones

Q_TILE = 32  # texts come whole, so a tile can hold more rows than where most sequences have one
TILES_AT_ONCE = 8


@struct.dataclass
class TextLayout:
    """Boundaries of the texts in a batch, computed once and shared by all layers.

    Tile `t` holds `Q_TILE` rows from place `tile_place[t]` of the text that begins at row `tile_start[t]` and has
    `tile_length[t]` rows, 0 for a tile without any. Row `r` is found again at `[row_tile[r], row_place[r]]`; it is
    number `positions[r]` of its text, or padding if not `is_real[r]`.
    """

    positions: Int[Array, " T"]
    is_real: Bool[Array, " T"]
    tile_start: Int[Array, " tiles"]
    tile_length: Int[Array, " tiles"]
    tile_place: Int[Array, " tiles"]
    row_tile: Int[Array, " T"]
    row_place: Int[Array, " T"]


def text_layout(cu_lens: Int[Array, " S_plus_1"], n_rows: int) -> TextLayout:
    """The layout of texts that own rows `cu_lens[s]` up to `cu_lens[s + 1]`; rows past the last are padding."""
    starts, ends = cu_lens[:-1], cu_lens[1:]
    n_texts = starts.shape[0]
    rows = jnp.arange(n_rows, dtype=jnp.int32)
    row_text = jnp.minimum(jnp.searchsorted(ends, rows, side="right").astype(jnp.int32), n_texts - 1)
    places, is_real = rows - starts[row_text], rows < ends[-1]

    # A tile each for min(S, T) first rows, then one for every further Q_TILE rows: no cut needs more.
    n_tiles = min(n_texts, n_rows) + max(0, n_rows - n_texts) // Q_TILE
    n_tiles += -n_tiles % TILES_AT_ONCE
    tile_ends = jnp.cumsum((ends - starts + Q_TILE - 1) // Q_TILE, dtype=jnp.int32)
    tile_starts = jnp.concatenate([jnp.zeros(1, jnp.int32), tile_ends[:-1]])
    tiles = jnp.arange(n_tiles, dtype=jnp.int32)
    tile_text = jnp.minimum(jnp.searchsorted(tile_ends, tiles, side="right").astype(jnp.int32), n_texts - 1)
    return TextLayout(
        positions=jnp.where(is_real, places, 0),
        is_real=is_real,
        tile_start=starts[tile_text],
        tile_length=jnp.where(tiles < tile_ends[-1], (ends - starts)[tile_text], 0),
        tile_place=(tiles - tile_starts[tile_text]) * Q_TILE,
        row_tile=jnp.minimum(tile_starts[row_text] + places // Q_TILE, n_tiles - 1),
        row_place=places % Q_TILE,
    )


def text_attention(
    q: Float[Array, "T n_heads key_dim"],
    k: Float[Array, "T n_kv_heads key_dim"],
    v: Float[Array, "T n_kv_heads value_dim"],
    layout: TextLayout,
    *,
    scale: float,
    window: int | None = None,
    slopes: Float[np.ndarray, " n_heads"] | None = None,
    bias: Float[Array, "distances n_heads"] | None = None,
) -> Float[Array, "T n_heads value_dim"]:
    """softmax(scale · q kᵀ + bias) v within each text.

    Args:
        q, k, v: rows of all texts. Query head `h` reads key head `h // (n_heads // n_kv_heads)`.
        layout: of the batch.
        scale: multiplier of the scores.
        window: a row sees the rows at most `window // 2` away from it; None sees all.
        slopes: what each head's scores lose per row of distance (ALiBi).
        bias: what is added to each head's scores by how far the key comes after the query, from `-n` to `n` rows
            for `2 n + 1` distances; those further away count as `n`.
    """
    n_rows, n_heads, _ = q.shape
    n_kv, value_dim = v.shape[1:]
    group = n_heads // n_kv
    half = None if window is None else window // 2

    def per_query(x: Array) -> Array:
        """`[tiles, Q_TILE, KV_BLOCK, n_heads]` as scores are held: `[tiles, n_kv, Q_TILE * group, KV_BLOCK]`."""
        x = x.reshape(TILES_AT_ONCE, Q_TILE, KV_BLOCK, n_kv, group).transpose(0, 3, 1, 4, 2)
        return x.reshape(TILES_AT_ONCE, n_kv, Q_TILE * group, KV_BLOCK)

    def some_tiles(tiles: tuple[Array, Array, Array]) -> Array:
        start, length, place = tiles
        q_places = place[:, None] + jnp.arange(Q_TILE, dtype=jnp.int32)
        queries = q[jnp.minimum(start[:, None] + q_places, n_rows - 1)]
        queries = queries.reshape(TILES_AT_ONCE, Q_TILE, n_kv, group, -1).swapaxes(1, 2)
        queries = queries.reshape(TILES_AT_ONCE, n_kv, Q_TILE * group, -1)

        def one_block(block: Array, sums: Sums) -> Sums:
            places = block * KV_BLOCK + jnp.arange(KV_BLOCK, dtype=jnp.int32)
            rows = jnp.minimum(start[:, None] + places, n_rows - 1)
            inside = places < length[:, None]
            # Rows of other texts may hold anything, NaN included: their values are zeroed, their scores masked.
            values = with_ones(jnp.where(inside[..., None, None], v[rows], jnp.zeros((), v.dtype)).swapaxes(1, 2))
            scores = batched_dot(queries, k[rows].swapaxes(1, 2), contract=3) * scale
            after = places - q_places[..., None]
            visible = jnp.broadcast_to(inside[:, None], after.shape)
            if half is not None:
                visible &= jnp.abs(after) <= half
            if slopes is not None:
                scores -= per_query(jnp.abs(after).astype(jnp.float32)[..., None] * slopes)
            if bias is not None:
                furthest = bias.shape[0] // 2
                scores += per_query(bias[jnp.clip(after, -furthest, furthest) + furthest])
            visible = jnp.repeat(visible, group, axis=1)[:, None]
            return add_block(sums, scores, visible, values)

        first, stop = jnp.zeros_like(length), length
        if half is not None:
            first = jnp.where(length > 0, jnp.maximum(place - half, 0), n_rows)
            stop = jnp.minimum(length, place + Q_TILE + half)
        empty = no_sums(TILES_AT_ONCE, n_kv, Q_TILE * group, value_dim=value_dim)
        first_block, end_block = jnp.min(first) // KV_BLOCK, (jnp.max(stop) + KV_BLOCK - 1) // KV_BLOCK
        _, total = bounded_loop(first_block, end_block, -(-n_rows // KV_BLOCK), one_block, empty)
        values, denominator = total[..., :-1], total[..., -1:]
        out = values / jnp.where(denominator == 0.0, 1.0, denominator)
        return out.reshape(TILES_AT_ONCE, n_kv, Q_TILE, group, value_dim).swapaxes(1, 2)

    tiles = (x.reshape(-1, TILES_AT_ONCE) for x in (layout.tile_start, layout.tile_length, layout.tile_place))
    out = lax.map(some_tiles, tuple(tiles)).reshape(-1, Q_TILE, n_heads, value_dim)
    return out[layout.row_tile, layout.row_place].astype(q.dtype)
