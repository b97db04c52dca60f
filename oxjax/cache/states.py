"""State that sequences own on the device, for every kind of layer. Host truth: no jax, no requests.

Attention keeps rows on pages, a recurrence keeps one value in a slot. Both are immutable once shared: a page
that somebody else reads is copied before it is written, and a step puts the new value of a recurrence into
another slot than the one it reads. So to fork is to count one more reference, to go back is to take up an old
value again, and a step that failed can be run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from oxjax.cache.blocks import BlockAllocator
from oxjax.cache.prefix import PrefixCache, PrefixTrail
from oxjax.errors import CacheError, CannotTruncate, PoolExhaustedError, StaleHandleError, WrongKindError


class Saved(NamedTuple):
    """A sequence's state on the host, the same whatever the page size.

    Attributes:
        n_tokens: tokens that it is the state of.
        rows: keys and values, `[n_tokens, ...]` for each page array of the model.
        values: recurrent state, `[...]` for each slot array of the model.
    """

    n_tokens: int
    rows: list[np.ndarray]
    values: list[np.ndarray]

    def cut(self, n_tokens: int) -> Saved | None:
        """The state after fewer tokens, where that can be told: rows can be left out, a recurrence not undone."""
        if n_tokens >= self.n_tokens:
            return self
        return Saved(n_tokens, [r[:n_tokens] for r in self.rows], []) if n_tokens and not self.values else None


@runtime_checkable
class Device(Protocol):
    """Operations of a pool on the device arrays. Calls take effect in order, and before any later step."""

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page on every paged layer."""

    def export(self, pages: Sequence[int], slot: int | None, n_tokens: int) -> Saved:
        """Copy a sequence's first rows, and its slot if it has one, to the host."""

    def restore(self, pages: Sequence[int], slot: int | None, saved: Saved, first: int) -> None:
        """Write the saved rows from row `first` on to these pages, and the saved values to the slot."""


SLOTS_PER_SEQUENCE = 2  # the one a step reads and the one it writes


@dataclass(eq=False)
class SequenceState:
    """A handle on one sequence's state; only its pool changes it.

    Attributes:
        pool: that owns the state; None once it was released.
        position: tokens that the state is the state of, on every layer.
        pages: with their keys and values, in order of position, and room for the coming step's.
        slot: with the recurrent state; None before the first token and without recurrent layers.
        next_slot: where the coming step puts the recurrent state.
        trail: how far it is known to the prefix cache, where there is one.
    """

    pool: StatePool | None = field(repr=False)
    trail: PrefixTrail | None = None
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
        prefix: finds the state of equal beginnings on the same pools; None computes everything.
    """

    def __init__(
        self,
        device: Device,
        *,
        page_size: int,
        pages: BlockAllocator | None = None,
        slots: BlockAllocator | None = None,
        prefix: PrefixCache | None = None,
    ):
        self.device, self.page_size, self.pages, self.slots, self.prefix = device, page_size, pages, slots, prefix
        self._slot_positions: dict[int, int] = {}

    def pages_for(self, n_tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-n_tokens // self.page_size) if self.pages is not None else 0

    @property
    def n_free_pages(self) -> int:
        """Pages that can be had now."""
        return 0 if self.pages is None else self.pages.free_count

    def trail(self) -> PrefixTrail | None:
        """The trail of a new sequence."""
        return None if self.prefix is None else self.prefix.trail()

    def fits(self, tokens: Sequence[int], *, limit: int, trail: PrefixTrail | None) -> bool:
        """There is room for the state of all these tokens, if `open` were called for them now."""
        live = 0 if self.prefix is None else self.prefix.peek(tokens, limit=limit, trail=trail)[1]
        room = self.pages is None or self.pages_for(len(tokens)) - live <= self.pages.free_count
        return room and (self.slots is None or self.slots.free_count >= SLOTS_PER_SEQUENCE)

    def open(
        self,
        tokens: Sequence[int] = (),
        *,
        limit: int = 0,
        trail: PrefixTrail | None = None,
        saved: Saved | None = None,
    ) -> SequenceState:
        """The state of a sequence as far as it is known: found by content, or saved, whichever is longer.

        Args:
            tokens: of the sequence.
            limit: tokens that may be found by content at most.
            trail: of the sequence, if there is a prefix cache.
            saved: what `export` gave for a beginning of `tokens`.

        Raises:
            PoolExhaustedError: no room for what was saved.
            WrongKindError: what was saved is not of this pool's kind of layers.
        """
        state = SequenceState(self, self.trail() if trail is None else trail)
        if saved is not None and (bool(saved.rows), bool(saved.values)) != (
            self.pages is not None,
            self.slots is not None,
        ):
            raise WrongKindError(
                f"saved state with {len(saved.rows)} page arrays and {len(saved.values)} slot arrays, for a pool "
                f"with{'' if self.pages else 'out'} pages and with{'' if self.slots else 'out'} slots"
            )
        if self.prefix is not None:
            state.position, state.pages, state.slot = self.prefix.match(tokens, limit=limit, trail=state.trail)
            self._check_slot(state)
        if saved is not None and saved.n_tokens > state.position:
            try:
                self._restore(state, saved)
            except BaseException:
                self.release(state)
                raise
        return state

    def _restore(self, state: SequenceState, saved: Saved) -> None:
        first, n_found = state.position, len(state.pages)
        if self.slots is not None:
            (slot,) = self.slots.allocate(1)
            self._drop_slot(state)
            state.slot = slot
            self._slot_positions[slot] = saved.n_tokens
        if self.pages is not None:
            state.pages += self.pages.allocate(self.pages_for(saved.n_tokens) - n_found)
        self.device.restore(state.pages[n_found:], state.slot, saved, first)
        state.position = saved.n_tokens

    def _shared(self, state: SequenceState) -> list[int]:
        """Places of its pages that the next row may go to and that others read too."""
        first = state.position // self.page_size
        return [i for i in range(first, len(state.pages)) if self.pages.ref_count(state.pages[i]) > 1]

    def reserve(self, state: SequenceState, length: int) -> None:
        """Make rows from its position up to `length` writable: pages that are its own, and a slot for the outcome.

        Raises:
            PoolExhaustedError: too few pages or slots are free; nothing was changed.
        """
        self._check(state)
        needs_slot = self.slots is not None and state.next_slot is None
        if needs_slot and not self.slots.free_count:
            raise PoolExhaustedError(f"no slot of {self.slots.capacity} is free for the coming step's state")
        if self.pages is not None:
            self._reserve_pages(state, length)
        if needs_slot:
            (state.next_slot,) = self.slots.allocate(1)

    def _reserve_pages(self, state: SequenceState, length: int) -> None:
        shared = self._shared(state)
        missing = max(0, self.pages_for(length) - len(state.pages)) + len(shared)
        new = self.pages.allocate(missing) if missing else []
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
            self.pages.forget(page)  # what is written is not what it was found by
        state.pages += new[len(shared) :]

    def advance(self, state: SequenceState, tokens: Sequence[int], n: int) -> None:
        """Record that `n` more tokens have been through the model, after `reserve` and a step that ended well.

        Args:
            state: of the sequence.
            tokens: of the sequence, those that were computed at least.
            n: how many.
        """
        self._check(state)
        assert self.pages is None or self.pages_for(state.position + n) <= len(state.pages)
        self._check_slot(state)
        state.position += n
        if self.slots is not None:
            assert state.next_slot is not None
            self._drop_slot(state)
            state.slot, state.next_slot = state.next_slot, None
            self._slot_positions[state.slot] = state.position
        if self.prefix is not None:
            if self.pages is not None:
                self.prefix.store(tokens, state.pages, state.position, state.trail)
            if self.slots is not None:
                self.prefix.store_checkpoint(tokens, state.slot, state.position, state.trail)

    def rows_at_most(self, state: SequenceState, n: int) -> int:
        """Number of the next `n` rows that can run in one step: none beyond the next checkpoint."""
        if self.slots is None or self.prefix is None:
            return n
        return min(n, self.prefix.stride - state.position % self.prefix.stride)

    def fork(self, state: SequenceState) -> SequenceState:
        """Another sequence that goes on from the same state; nothing is copied until one of them writes."""
        self._check(state)
        pages = state.pages[: self.pages_for(state.position)]
        if self.pages is not None:
            self.pages.acquire(pages)
        if state.slot is not None:
            self.slots.acquire([state.slot])
        trail = None if state.trail is None else state.trail.copy()
        return SequenceState(self, trail, state.position, pages, state.slot)

    def positions(self, state: SequenceState) -> Sequence[int]:
        """Positions that `truncate` can go back to, in order: all of them, or with recurrent layers the kept ones."""
        self._check(state)
        if self.slots is None:
            return range(state.position + 1)
        kept = {} if self.prefix is None else self.prefix.checkpoints(state.position, state.trail)
        return sorted({0, state.position, *kept})

    def truncate(self, state: SequenceState, position: int) -> None:
        """Go back to an earlier position, as if no later token had been computed; nothing happens at its own.

        Raises:
            CannotTruncate: beyond the position, or no state is kept for it; nothing was changed.
        """
        if position not in (available := self.positions(state)):
            raise CannotTruncate(position, available)
        if position == state.position:
            return
        if self.slots is not None:
            kept = self.prefix.checkpoints(position, state.trail) if position else {}
            self._drop_slot(state)
            if position:
                state.slot = self.slots.acquire_cached(state.trail.keys[position // self.page_size - 1])
                assert state.slot == kept[position]
        if self.pages is not None:
            keep = self.pages_for(position)
            self.pages.free(state.pages[keep:])
            del state.pages[keep:]
        if state.trail is not None:
            state.trail.cut(position // self.page_size)
        state.position = position
        self._check_slot(state)

    def reset(self, state: SequenceState) -> None:
        """Go back to the beginning."""
        self.truncate(state, 0)

    def export(self, state: SequenceState) -> Saved:
        """A copy on the host; the state stays as it is."""
        self._check(state)
        return self.device.export(state.pages[: self.pages_for(state.position)], state.slot, state.position)

    def release(self, state: SequenceState) -> None:
        """Give everything back; the handle is stale then."""
        self._check(state)
        if self.pages is not None:
            self.pages.free(state.pages)
        self._drop_slot(state)
        if state.next_slot is not None:
            self.slots.free([state.next_slot])
        if state.trail is not None:
            state.trail.n_stored = 0
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
        """All layers agree on the position."""
        if self.slots is not None:
            found = 0 if state.slot is None else self._slot_positions[state.slot]
            if found != state.position:
                raise CacheError(f"slot {state.slot} is at position {found}, and its sequence at {state.position}")
