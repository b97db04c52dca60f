"""Copies of a sequence's state between the device and the host, and from page to page: for snapshots and preemption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Int

from oxjax.cache.allocator import NULL_PAGE
from oxjax.cache.slots import RecurrentState
from oxjax.cache.states import SwappedState

State = TypeVar("State")  # a pytree of `RecurrentState`s and, apart from those, page arrays `[pages, page_size, ...]`


def page_arrays(state: Any) -> list[Array]:
    """The page arrays of a state, in the order of its leaves."""
    return [leaf for leaf in jax.tree.leaves(state, is_leaf=_is_recurrent) if not _is_recurrent(leaf)]


def slot_arrays(state: Any) -> list[Array]:
    """The slot arrays of a state, `[slots, ...]` each, in the order of its leaves."""
    recurrent = filter(_is_recurrent, jax.tree.leaves(state, is_leaf=_is_recurrent))
    return [array for layer in recurrent for array in jax.tree.leaves(layer)]


def page_bucket(n_pages: int) -> int:
    """Number of pages that a transfer of `n_pages` is compiled for: the next power of two."""
    return 1 << max(n_pages - 1, 0).bit_length()


@jax.jit
def gather(state: Any, pages: Int[Array, " P"], slot: Int[Array, ""]) -> tuple[list[Array], list[Array]]:
    """Copies of these pages, `[P, page_size, ...]` for each page array, and of this slot for each slot array."""
    return [array[pages] for array in page_arrays(state)], [array[slot] for array in slot_arrays(state)]


@partial(jax.jit, donate_argnums=0)
def scatter(
    state: State, pages: Int[Array, " P"], contents: list[Array], slot: Int[Array, ""], values: list[Array]
) -> State:
    """The state with these pages and this slot replaced, in place since it is donated."""
    new_pages, new_values = iter(contents), iter(values)
    return _map(state, lambda a: a.at[pages].set(next(new_pages)), lambda a: a.at[slot].set(next(new_values)))


@partial(jax.jit, donate_argnums=0)
def copy_page(state: State, source: Int[Array, ""], target: Int[Array, ""]) -> State:
    """The state with one page copied to another, in place since it is donated."""
    return _map(state, lambda a: a.at[target].set(a[source]), lambda a: a)


def export_state(state: Any, pages: Sequence[int], slot: int | None, n_tokens: int) -> SwappedState:
    """Copy the state of a sequence to the host; the arrays stay as they are.

    Args:
        state: of every layer.
        pages: of the sequence, in order of position; they hold at least `n_tokens`.
        slot: of the sequence; None before its first token and without recurrent layers.
        n_tokens: number of tokens computed.
    """
    contents, values = jax.device_get(gather(state, *_padded(pages, slot)))
    rows = [content.reshape(-1, *content.shape[2:])[:n_tokens] for content in contents]
    return SwappedState(n_tokens, rows, [] if slot is None else values)


def import_state(state: State, pages: Sequence[int], slot: int | None, swapped: SwappedState, first: int) -> State:
    """Write the result of `export_state` to these pages and this slot.

    Args:
        state: of every layer; donated.
        pages: for the rows from `first` on. Rows after the last one become zero.
        slot: for the recurrent state; None without recurrent layers.
        swapped: of a sequence.
        first: index of the first row of the first page.
    """
    ids, at = _padded(pages, slot)
    contents = [
        _whole_pages(rows[first:], len(ids), array.shape[1])
        for rows, array in zip(swapped.rows, page_arrays(state), strict=True)
    ]
    return scatter(state, ids, contents, at, swapped.values)


def _is_recurrent(node: Any) -> bool:
    return isinstance(node, RecurrentState)


def _map(state: State, on_pages: Callable[[Array], Array], on_slots: Callable[[Array], Array]) -> State:
    def update(node: Any) -> Any:
        return jax.tree.map(on_slots, node) if _is_recurrent(node) else on_pages(node)

    return jax.tree.map(update, state, is_leaf=_is_recurrent)


def _padded(pages: Sequence[int], slot: int | None) -> tuple[Array, Array]:
    """Page ids padded with the null page up to the bucket, and the slot, or the null slot for None."""
    ids = np.full(page_bucket(len(pages)), NULL_PAGE, np.int32)
    ids[: len(pages)] = pages
    return jax.device_put((ids, np.int32(NULL_PAGE if slot is None else slot)))


def _whole_pages(rows: np.ndarray, n_pages: int, page_size: int) -> np.ndarray:
    whole = np.zeros((n_pages * page_size, *rows.shape[1:]), rows.dtype)
    whole[: len(rows)] = rows
    return whole.reshape(n_pages, page_size, *rows.shape[1:])
