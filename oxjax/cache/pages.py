"""Pages of keys and values, or of what stands for them, on the device: immutable, donated to each step, ignorant of
requests.
"""

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


@struct.dataclass
class LatentPages:
    """What all heads' keys and values of one layer come from, `[pages, page_size, ...]` each (see `LatentSpec`).

    Attributes:
        latent: normalised.
        rope_k: the rotated dimensions of the keys, which all heads share.
    """

    latent: Float[Array, "pages page_size kv_rank"]
    rope_k: Float[Array, "pages page_size rope_dim"]


def write_latent_rows(
    pages: LatentPages,
    latent: Float[Array, "T kv_rank"],
    rope_k: Float[Array, "T rope_dim"],
    page: Int[Array, " T"],
    offset: Int[Array, " T"],
) -> LatentPages:
    """Store each row's latent and rotated key at `[page, offset]`. In place when the pages were donated."""
    return LatentPages(
        latent=pages.latent.at[page, offset].set(latent.astype(pages.latent.dtype)),
        rope_k=pages.rope_k.at[page, offset].set(rope_k.astype(pages.rope_k.dtype)),
    )


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
