"""State pool: the pages and slots of every sequence, behind one interface for all kinds of layers.

Host only: no jax, no requests. Attention keeps rows on pages, a recurrence keeps one value in a slot. Both are
immutable once shared: a page with another reader is copied before it is written, and a step writes the new value of a
recurrence to another slot than the one it reads. So a fork is one more reference, a rewind takes up an older value,
and a step that failed can be run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from oxjax.cache.allocator import PageAllocator
from oxjax.cache.prefix import BlockHashes, NoPrefix, PrefixCache
from oxjax.errors import CacheError, CannotTruncate, PoolExhaustedError, StaleHandleError, WrongKindError


class SwappedState(NamedTuple):
    """A sequence's state on the host, the same whatever the page size.

    Attributes:
        n_tokens: tokens that it is the state of.
        rows: keys and values, `[n_tokens, ...]` for each page array of the model.
        values: recurrent state, `[...]` for each slot array of the model.
    """

    n_tokens: int
    rows: list[np.ndarray]
    values: list[np.ndarray]

    def cut(self, n_tokens: int) -> SwappedState | None:
        """The state after fewer tokens; None with recurrent state, which cannot be undone."""
        if n_tokens >= self.n_tokens:
            return self
        return SwappedState(n_tokens, [r[:n_tokens] for r in self.rows], []) if n_tokens and not self.values else None


@runtime_checkable
class Device(Protocol):
    """The arrays of a pool. Calls take effect in their order, and before any later step."""

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page on every paged layer."""

    def export(self, pages: Sequence[int], slot: int | None, n_tokens: int) -> SwappedState:
        """Copy the first rows of a sequence, and its slot if it has one, to the host."""
        ...

    def restore(self, pages: Sequence[int], slot: int | None, swapped: SwappedState, first: int) -> None:
        """Write swapped rows, from row `first` on, to these pages, and the recurrent state to the slot."""


SLOTS_PER_SEQUENCE = 2  # a step reads one and writes the other


@dataclass(eq=False)
class SequenceState:
    """A handle on one sequence's state; only its pool changes it.

    Attributes:
        pool: owner of the state; None once it was released.
        block_hashes: hashes of its full pages, for the prefix cache.
        position: number of tokens computed, on every layer.
        pages: with their keys and values, in order of position, and room for those of the next step.
        slot: with the recurrent state; None before the first token and without recurrent layers.
        next_slot: slot that the next step writes the recurrent state to.
    """

    pool: StatePool | None = field(repr=False)
    block_hashes: BlockHashes
    position: int = 0
    pages: list[int] = field(default_factory=list)
    slot: int | None = None
    next_slot: int | None = None


class StatePool:
    """The single owner of pages and slots. Every operation is whole or not at all.

    Invariants: logical length, pages, and recurrent state of a sequence belong to the same position, which is
    kept once; what a sequence may write has no other reader and cannot be found by content.

    Args:
        device: moves the contents.
        page_size: tokens of a page.
        pages: the page pool; None without paged layers.
        slots: the slot pool; None without recurrent layers. A sequence that runs holds `SLOTS_PER_SEQUENCE`.
        prefix: prefix cache on the same pools; None computes everything.
    """

    def __init__(
        self,
        device: Device,
        *,
        page_size: int,
        pages: PageAllocator | None = None,
        slots: PageAllocator | None = None,
        prefix: PrefixCache | None = None,
    ):
        self.device = device
        self.page_size = page_size
        self.pages = PageAllocator.empty() if pages is None else pages
        self.slots = PageAllocator.empty("slot") if slots is None else slots
        self.prefix = NoPrefix() if prefix is None else prefix
        self._slot_positions: dict[int, int] = {}

    @property
    def is_paged(self) -> bool:
        """The model has layers that keep rows on pages."""
        return self.pages.capacity > 0

    @property
    def is_recurrent(self) -> bool:
        """The model has layers that keep a value in a slot."""
        return self.slots.capacity > 0

    @property
    def reuses_prefixes(self) -> bool:
        """There is a prefix cache."""
        return isinstance(self.prefix, PrefixCache)

    def pages_for(self, n_tokens: int) -> int:
        """Number of pages that hold this many tokens."""
        return -(-n_tokens // self.page_size) if self.is_paged else 0

    @property
    def n_free_pages(self) -> int:
        """Number of pages that can be allocated now."""
        return self.pages.free_count

    def fits(self, tokens: Sequence[int], *, limit: int, block_hashes: BlockHashes) -> bool:
        """Return True if there is room for the state of all these tokens, if `open` were called for them now."""
        _, n_live = self.prefix.peek(tokens, limit=limit, block_hashes=block_hashes)
        if self.is_recurrent and self.slots.free_count < SLOTS_PER_SEQUENCE:
            return False
        return self.pages_for(len(tokens)) - n_live <= self.pages.free_count

    def open(
        self,
        tokens: Sequence[int] = (),
        *,
        limit: int = 0,
        block_hashes: BlockHashes | None = None,
        swapped: SwappedState | None = None,
    ) -> SequenceState:
        """Open the state of a sequence: from the prefix cache or from the host, whichever holds more tokens.

        Args:
            tokens: of the sequence.
            limit: largest number of tokens that may come from the prefix cache.
            block_hashes: of the sequence; None makes new ones.
            swapped: from `export`, of a prefix of `tokens`.

        Raises:
            PoolExhaustedError: no room for the swapped state.
            WrongKindError: the swapped state comes from other kinds of layers than this pool's.
        """
        if swapped is not None and (bool(swapped.rows), bool(swapped.values)) != (self.is_paged, self.is_recurrent):
            raise WrongKindError(
                f"swapped state with {len(swapped.rows)} page arrays and {len(swapped.values)} slot arrays, for a pool "
                f"with{'' if self.is_paged else 'out'} pages and with{'' if self.is_recurrent else 'out'} slots"
            )
        hashes = self.prefix.block_hashes() if block_hashes is None else block_hashes
        found = self.prefix.match(tokens, limit=limit, block_hashes=hashes)
        state = SequenceState(self, hashes, found.n_tokens, found.pages, found.slot)
        self._check_slot(state)
        if swapped is not None and swapped.n_tokens > state.position:
            try:
                self._restore(state, swapped)
            except BaseException:
                self.release(state)
                raise
        return state

    def _restore(self, state: SequenceState, swapped: SwappedState) -> None:
        first, n_found = state.position, len(state.pages)
        if self.is_recurrent:
            (slot,) = self.slots.allocate(1)
            self._drop_slot(state)
            state.slot = slot
            self._slot_positions[slot] = swapped.n_tokens
        state.pages += self.pages.allocate(self.pages_for(swapped.n_tokens) - n_found)
        self.device.restore(state.pages[n_found:], state.slot, swapped, first)
        state.position = swapped.n_tokens

    def _shared(self, state: SequenceState) -> list[int]:
        """Indices of its pages that the next rows may be written to and that have other readers."""
        first = state.position // self.page_size
        return [i for i in range(first, len(state.pages)) if self.pages.ref_count(state.pages[i]) > 1]

    def reserve(self, state: SequenceState, length: int) -> None:
        """Make rows from its position up to `length` writable: pages of its own, and a slot for the new state.

        Raises:
            PoolExhaustedError: too few pages or slots are free; nothing was changed.
        """
        self._check(state)
        needs_slot = self.is_recurrent and state.next_slot is None
        if needs_slot and not self.slots.free_count:
            raise PoolExhaustedError(f"no slot of {self.slots.capacity} is free for the state after the next step")
        self._reserve_pages(state, length)
        if needs_slot:
            (state.next_slot,) = self.slots.allocate(1)

    def _reserve_pages(self, state: SequenceState, length: int) -> None:
        shared = self._shared(state)
        missing = max(0, self.pages_for(length) - len(state.pages)) + len(shared)
        new = self.pages.allocate(missing)
        try:
            for i, page in zip(shared, new, strict=False):
                self.device.copy_page(state.pages[i], page)
        except BaseException:
            self.pages.free(new)
            raise
        for i, page in zip(shared, new, strict=False):
            self.pages.free([state.pages[i]])
            state.pages[i] = page
        for page in state.pages[state.position // self.page_size :]:
            self.pages.forget(page)  # its content will no longer be what its key names
        state.pages += new[len(shared) :]

    def advance(self, state: SequenceState, tokens: Sequence[int], n: int) -> None:
        """Record that a step has computed `n` more tokens, after `reserve`.

        Args:
            state: of the sequence.
            tokens: of the sequence; at least those that were computed.
            n: number of tokens.
        """
        self._check(state)
        assert self.pages_for(state.position + n) <= len(state.pages)
        self._check_slot(state)
        state.position += n
        if self.is_recurrent:
            assert state.next_slot is not None
            self._drop_slot(state)
            state.slot, state.next_slot = state.next_slot, None
            self._slot_positions[state.slot] = state.position
        if self.is_paged:
            self.prefix.store(tokens, state.pages, state.position, state.block_hashes)
        if state.slot is not None:
            self.prefix.store_checkpoint(tokens, state.slot, state.position, state.block_hashes)

    def rows_at_most(self, state: SequenceState, n: int) -> int:
        """Number of the next `n` rows that can run in one step: none beyond the next checkpoint."""
        return self.prefix.rows_to_checkpoint(state.position, n)

    def fork(self, state: SequenceState) -> SequenceState:
        """State of another sequence that continues from the same tokens; nothing is copied until one of them writes."""
        self._check(state)
        pages = state.pages[: self.pages_for(state.position)]
        self.pages.acquire(pages)
        if state.slot is not None:
            self.slots.acquire([state.slot])
        return SequenceState(self, state.block_hashes.copy(), state.position, pages, state.slot)

    def positions(self, state: SequenceState) -> Sequence[int]:
        """Positions that `truncate` can go back to, in order: all of them, or with recurrent layers the kept ones."""
        self._check(state)
        if not self.is_recurrent:
            return range(state.position + 1)
        return sorted({0, state.position, *self.prefix.checkpoints(state.position, state.block_hashes)})

    def truncate(self, state: SequenceState, position: int) -> None:
        """Go back to an earlier position, as if no later token had been computed; its own position changes nothing.

        Raises:
            CannotTruncate: beyond the position, or no state is kept for it; nothing was changed.
        """
        if position not in (available := self.positions(state)):
            raise CannotTruncate(position, available)
        if position == state.position:
            return
        if self.is_recurrent:
            kept = self.prefix.checkpoints(position, state.block_hashes)
            self._drop_slot(state)
            if position:
                state.slot = self.slots.acquire_cached(state.block_hashes.hashes[position // self.page_size - 1])
                assert state.slot == kept[position]
        keep = self.pages_for(position)
        self.pages.free(state.pages[keep:])
        del state.pages[keep:]
        state.block_hashes.cut(position // self.page_size)
        state.position = position
        self._check_slot(state)

    def export(self, state: SequenceState) -> SwappedState:
        """Copy the state to the host; it stays as it is."""
        self._check(state)
        return self.device.export(state.pages[: self.pages_for(state.position)], state.slot, state.position)

    def release(self, state: SequenceState) -> None:
        """Free the pages and slots; the handle is stale then."""
        self._check(state)
        self.pages.free(state.pages)
        self._drop_slot(state)
        if state.next_slot is not None:
            self.slots.free([state.next_slot])
        state.block_hashes.n_stored = 0
        state.pool, state.pages, state.slot, state.next_slot = None, [], None, None

    def _drop_slot(self, state: SequenceState) -> None:
        if state.slot is not None:
            self.slots.free([state.slot])
            state.slot = None

    def _check(self, state: SequenceState) -> None:
        if state.pool is not self:
            what = "was released" if state.pool is None else "belongs to another pool"
            raise StaleHandleError(f"the handle of a sequence at position {state.position} {what}")

    def _check_slot(self, state: SequenceState) -> None:
        """Check that the slot holds the state at the sequence's position."""
        if self.is_recurrent:
            found = 0 if state.slot is None else self._slot_positions[state.slot]
            if found != state.position:
                raise CacheError(f"slot {state.slot} is at position {found}, and its sequence at {state.position}")
