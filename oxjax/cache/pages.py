"""Pages of keys and values, or of latents, on the device: immutable, donated to each step, ignorant of requests."""

from __future__ import annotations

from typing import TypeVar

import jax
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
    """Latents of one layer, from which all heads compute keys and values, `[pages, page_size, ...]` each.

    Attributes:
        latent: normalised.
        rope_k: rotated dimensions of the keys, shared by all heads.
    """

    latent: Float[Array, "pages page_size kv_rank"]
    rope_k: Float[Array, "pages page_size rope_dim"]


Pages = TypeVar("Pages", KVPages, LatentPages)


def write_rows(pages: Pages, *rows: Float[Array, "T ..."], page: Int[Array, " T"], offset: Int[Array, " T"]) -> Pages:
    """Store each row at `[page, offset]`; one array of rows for each array of `pages`, in the order of its fields.

    In place when the pages were donated.
    """
    arrays, tree = jax.tree.flatten(pages)
    written = (a.at[page, offset].set(r.astype(a.dtype)) for a, r in zip(arrays, rows, strict=True))
    return jax.tree.unflatten(tree, written)
