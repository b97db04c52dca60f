"""Which rows of which sequences run next. Host only: no jax, no model, no sampling.

First come, first served. A step takes one row of every sequence that decodes, then fills its row budget
with chunks of prompts, oldest first. A sequence is admitted when a place and all the pages that it can
ever need are free, so nothing that runs can run out.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from oxjax.cache.blocks import PageAllocator
from oxjax.errors import RequestTooLargeError


@dataclass(eq=False)
class Sequence:
    """One sequence on the host.

    Invariant: the pages hold the keys and values of exactly `tokens[:n_computed]`.

    Attributes:
        tokens: the prompt and everything generated so far.
        max_length: length at which it ends at the latest.
        n_computed: tokens that have been through the model.
        pages: page ids, in order of position; empty while waiting.
        all_logits: logits are wanted for every row, not for the last alone.
    """

    tokens: list[int]
    max_length: int
    all_logits: bool = False
    n_computed: int = 0
    pages: list[int] = field(default_factory=list)


class Work(NamedTuple):
    """Rows of one sequence in a step: its tokens from `start` to `start + n_rows`."""

    sequence: Sequence
    start: int
    n_rows: int

    @property
    def reaches_end(self) -> bool:
        """Whether the last row's logits choose the next token."""
        return self.start + self.n_rows == len(self.sequence.tokens)


class Scheduler:
    """Owns the pages of sequences and decides what runs.

    Args:
        allocator: the page pool.
        page_size: tokens of a page.
        max_batch: sequences that run at once.
        max_rows: row budget of a step; at least `max_batch`.
        max_context: tokens that a sequence may reach.
    """

    def __init__(self, allocator: PageAllocator, *, page_size: int, max_batch: int, max_rows: int, max_context: int):
        if max_rows < max_batch:
            raise ValueError(f"a row budget of {max_rows} cannot serve {max_batch} sequences a row each")
        self.allocator, self.page_size = allocator, page_size
        self.max_batch, self.max_rows, self.max_context = max_batch, max_rows, max_context
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def pages_for(self, n_tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-n_tokens // self.page_size)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            RequestTooLargeError: it could never run, however empty the pool.
        """
        length, limit = sequence.max_length, self.max_context
        if length > limit:
            raise RequestTooLargeError(
                f"{len(sequence.tokens)} prompt tokens and up to {length - len(sequence.tokens)} new ones make "
                f"{length}, and the context holds {limit}: shorten the prompt, lower max_tokens or raise max_context"
            )
        if (needed := self.pages_for(length)) > self.allocator.capacity:
            raise RequestTooLargeError(
                f"{length} tokens need {needed} pages of {self.page_size}, and the pool has {self.allocator.capacity}"
            )
        self.waiting.append(sequence)

    def schedule(self) -> list[Work]:
        """The next step's rows, at most `max_rows`; empty when nothing waits or runs.

        Nothing about the sequences changes until `commit`, but waiting ones may be admitted.
        """
        self._admit()
        budget = self.max_rows
        work = []
        for sequence in sorted(self.running, key=lambda s: len(s.tokens) - s.n_computed > 1):  # stable: age within
            n_rows = min(len(sequence.tokens) - sequence.n_computed, budget)
            if n_rows:
                work.append(Work(sequence, sequence.n_computed, n_rows))
                budget -= n_rows
        return work

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_batch:
            needed = self.pages_for(self.waiting[0].max_length)
            if needed > self.allocator.free_count:
                return
            sequence = self.waiting.popleft()
            sequence.pages = self.allocator.allocate(needed)
            self.running.append(sequence)

    def commit(self, work: list[Work]) -> None:
        """Record that these rows have been through the model."""
        for item in work:
            assert item.start == item.sequence.n_computed
            item.sequence.n_computed += item.n_rows

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not, and take its pages back."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.allocator.free(sequence.pages)
            sequence.pages = []
        else:
            self.waiting.remove(sequence)
