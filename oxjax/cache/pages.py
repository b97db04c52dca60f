"""Pages of keys and values on the device: immutable, donated to each step, ignorant of requests."""

from __future__ import annotations

from flax import struct
from jaxtyping import Array, Float, Int


@struct.dataclass
class KVPages:
    """Keys (after RoPE) and values of one layer, `[pages, page_size, n_kv_heads, head_dim]` each.

    Page ids mean the same on every layer: one block table serves them all.
    """

    k: Float[Array, "pages page_size n_kv_heads key_dim"]
    v: Float[Array, "pages page_size n_kv_heads value_dim"]


def write_rows(
    pages: KVPages,
    k: Float[Array, "T n_kv_heads key_dim"],
    v: Float[Array, "T n_kv_heads value_dim"],
    page: Int[Array, " T"],
    offset: Int[Array, " T"],
) -> KVPages:
    """Store each row's key and value at `[page, offset]`. In place when the pages were donated."""
    return KVPages(
        k=pages.k.at[page, offset].set(k.astype(pages.k.dtype)),
        v=pages.v.at[page, offset].set(v.astype(pages.v.dtype)),
    )
