"""The input of a step: flat rows of several sequences, and what the device derives from their cut points.

Rows of one sequence are consecutive. A decoded token, a chunk of a prompt, drafts to verify and a text to
score are the same thing here: rows with positions.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from oxjax.cache.allocator import NULL_PAGE


@struct.dataclass
class Batch:
    """One step's work; int32 arrays of static, bucketed shapes.

    Attributes:
        tokens: ids, `[T]`; rows at and past `cu_q_lens[-1]` are padding.
        positions: absolute position of each row in its sequence, `[T]`.
        cu_q_lens: sequence `s` owns rows `cu_q_lens[s]` up to `cu_q_lens[s + 1]`, `[S + 1]`.
        kv_lens: tokens of each sequence including this step's rows, `[S]`.
        block_tables: page of each `page_size` tokens of a sequence, `[S, P]`; unused entries are page 0.
        read_slots: slot with the recurrent state of the tokens before this step's, `[S]`; any for a beginning
            sequence, and for models without recurrent layers.
        write_slots: slot for the state after this step's rows, `[S]`; never one that is read in the same step, so
            that a step can be run again. Slot 0 where a sequence has no rows.
        logits_rows: rows whose logits are wanted, `[N]`.
    """

    tokens: Int[Array, " T"]
    positions: Int[Array, " T"]
    cu_q_lens: Int[Array, " S_plus_1"]
    kv_lens: Int[Array, " S"]
    block_tables: Int[Array, "S P"]
    read_slots: Int[Array, " S"]
    write_slots: Int[Array, " S"]
    logits_rows: Int[Array, " N"]


def padded(batch: Batch, least: int) -> Batch:
    """The same batch, padded to at least this many rows."""
    padding = (0, max(0, least - batch.tokens.shape[0]))
    return batch.replace(tokens=jnp.pad(batch.tokens, padding), positions=jnp.pad(batch.positions, padding))


@struct.dataclass
class RowLayout:
    """Where rows read and write, computed once a step and shared by all layers.

    Attention runs over query tiles; a tile holds rows of one sequence only. `tile_rows[t, i]` is the row in
    place `i` of tile `t`, `tile_positions` its position or -1 for an empty place, and row `r` is found again
    at `[row_tile[r], row_place[r]]`. Rows are written to `[write_page, write_offset]`; padding to the null page.

    Row `r` belongs to sequence `s = row_seq[r]` if `is_real[r]`, whose pages are `block_tables[s]`. Recurrent layers
    take its rows in order, from `starts[s]` up to `ends[s]`; the state comes from `read_slots[s]`, or is empty where
    `begins[s]`, and goes to `write_slots[s]`.
    """

    positions: Int[Array, " T"]
    write_page: Int[Array, " T"]
    write_offset: Int[Array, " T"]
    tile_rows: Int[Array, "tiles q_tile"]
    tile_positions: Int[Array, "tiles q_tile"]
    tile_tables: Int[Array, "tiles P"]
    tile_kv_lens: Int[Array, " tiles"]
    row_tile: Int[Array, " T"]
    row_place: Int[Array, " T"]
    row_seq: Int[Array, " T"]
    is_real: Bool[Array, " T"]
    block_tables: Int[Array, "S P"]
    starts: Int[Array, " S"]
    ends: Int[Array, " S"]
    begins: Bool[Array, " S"]
    read_slots: Int[Array, " S"]
    write_slots: Int[Array, " S"]


def row_layout(batch: Batch, *, page_size: int, q_tile: int) -> RowLayout:
    """Derive the layout of a batch; all integer work on a few hundred numbers."""
    n_rows, n_seqs = batch.tokens.shape[0], batch.kv_lens.shape[0]
    starts, ends = batch.cu_q_lens[:-1], batch.cu_q_lens[1:]
    rows = jnp.arange(n_rows, dtype=jnp.int32)
    is_real = rows < batch.cu_q_lens[-1]
    row_seq = jnp.minimum(jnp.searchsorted(ends, rows, side="right").astype(jnp.int32), n_seqs - 1)
    page = batch.block_tables[row_seq, batch.positions // page_size]

    # A tile each for min(S, T) first rows, then one for every further q_tile rows: no cut needs more.
    n_tiles = min(n_seqs, n_rows) + max(0, n_rows - n_seqs) // q_tile
    tiles_of_seq = (ends - starts + q_tile - 1) // q_tile
    tile_ends = jnp.cumsum(tiles_of_seq, dtype=jnp.int32)
    tile_starts = tile_ends - tiles_of_seq
    tiles = jnp.arange(n_tiles, dtype=jnp.int32)
    tile_seq = jnp.minimum(jnp.searchsorted(tile_ends, tiles, side="right").astype(jnp.int32), n_seqs - 1)
    first_row = starts[tile_seq] + (tiles - tile_starts[tile_seq]) * q_tile
    tile_rows = first_row[:, None] + jnp.arange(q_tile, dtype=jnp.int32)
    in_tile = (tile_rows < ends[tile_seq][:, None]) & (tiles < tile_ends[-1])[:, None]
    tile_rows = jnp.minimum(tile_rows, n_rows - 1)
    return RowLayout(
        positions=batch.positions,
        write_page=jnp.where(is_real, page, NULL_PAGE),
        write_offset=batch.positions % page_size,
        tile_rows=tile_rows,
        tile_positions=jnp.where(in_tile, batch.positions[tile_rows], -1),
        tile_tables=batch.block_tables[tile_seq],
        tile_kv_lens=batch.kv_lens[tile_seq],
        row_tile=jnp.clip(tile_starts[row_seq] + (rows - starts[row_seq]) // q_tile, 0, n_tiles - 1),
        row_place=(rows - starts[row_seq]) % q_tile,
        row_seq=row_seq,
        is_real=is_real,
        block_tables=batch.block_tables,
        starts=starts,
        ends=ends,
        begins=batch.kv_lens == ends - starts,
        read_slots=batch.read_slots,
        write_slots=batch.write_slots,
    )
