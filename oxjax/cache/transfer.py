"""Rows of a sequence between its pages and the host: for snapshots, or to make room for others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Array, Int

from oxjax.cache.blocks import NULL_PAGE

State = TypeVar("State")  # a pytree of page arrays, `[pages, page_size, ...]` each


def page_bucket(n_pages: int) -> int:
    """Pages that a transfer of `n_pages` is compiled for: the next power of two."""
    return 1 << max(n_pages - 1, 0).bit_length()


@jax.jit
def gather_pages(state: object, pages: Int[Array, " P"]) -> list[Array]:
    """Copies of these pages, `[P, page_size, ...]` for each array of the state in the order of its leaves."""
    return [leaf[pages] for leaf in jax.tree.leaves(state)]


@partial(jax.jit, donate_argnums=0)
def scatter_pages(state: State, pages: Int[Array, " P"], contents: list[Array]) -> State:
    """The state with the contents of these pages replaced, in place since it is donated."""
    leaves, tree = jax.tree.flatten(state)
    return jax.tree.unflatten(tree, [leaf.at[pages].set(new) for leaf, new in zip(leaves, contents, strict=True)])


def export_pages(state: object, pages: Sequence[int], n_tokens: int) -> list[np.ndarray]:
    """Keys and values of a sequence's first tokens; the state stays as it is.

    Args:
        state: page arrays of every layer.
        pages: the sequence's, in order of position; they hold `n_tokens` at least.
        n_tokens: rows wanted.

    Returns:
        Rows `[n_tokens, ...]` for each array of the state, in the order of its leaves: the same whatever the
        page size.
    """
    contents = jax.device_get(gather_pages(state, _padded(pages)))
    return [content.reshape(-1, *content.shape[2:])[:n_tokens] for content in contents]


def import_pages(state: State, pages: Sequence[int], rows: Sequence[np.ndarray]) -> State:
    """The state with the rows that `export_pages` gave in these pages, from the beginning of the first one.

    Args:
        state: page arrays of every layer; donated.
        pages: as many as the rows need. What follows the last row in its page becomes zero.
        rows: `[n_tokens, ...]` for each array of the state, in the order of its leaves.
    """
    page_size, ids = jax.tree.leaves(state)[0].shape[1], _padded(pages)
    return scatter_pages(state, ids, [_whole_pages(array, len(ids), page_size) for array in rows])


def _padded(pages: Sequence[int]) -> Int[Array, " P"]:
    """Page ids up to the bucket; the null page, which takes all padding, fills the rest."""
    ids = np.full(page_bucket(len(pages)), NULL_PAGE, np.int32)
    ids[: len(pages)] = pages
    return jax.device_put(ids)


def _whole_pages(rows: np.ndarray, n_pages: int, page_size: int) -> np.ndarray:
    whole = np.zeros((n_pages * page_size, *rows.shape[1:]), rows.dtype)
    whole[: len(rows)] = rows
    return whole.reshape(n_pages, page_size, *rows.shape[1:])
