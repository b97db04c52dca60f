"""Which rows of which sequences run next. Host only: no jax, no model, no sampling.

First come, first served. A step takes one row of every sequence that decodes, then fills its row budget
with chunks of prompts, oldest first. Pages are taken as a sequence grows. When none is left, the youngest
running sequence gives all of its pages up and waits at the head of the queue, its rows kept on the host or
to be computed again; so the oldest always moves, and everything ends. Pages of computed tokens stay findable
by content until they are needed for something else; a sequence waits while another computes the beginning
that they share.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from oxjax.cache.blocks import PageAllocator
from oxjax.cache.prefix import PrefixCache, PrefixTrail
from oxjax.errors import RequestTooLargeError


class Saved(NamedTuple):
    """Keys and values of a sequence's first `n_tokens` tokens on the host, `[n_tokens, ...]` for each page array."""

    n_tokens: int
    rows: list[np.ndarray]


@dataclass(eq=False)
class Sequence:
    """One sequence on the host.

    Invariant: the pages hold the keys and values of at least `tokens[:n_computed]`, in order of position.

    Attributes:
        tokens: the prompt and everything generated so far.
        max_length: length at which it ends at the latest.
        all_logits: logits are wanted for every row, not for the last alone, so no row may be skipped.
        n_computed: tokens whose keys and values are in its pages.
        pages: page ids; empty while waiting.
        trail: how far its pages are known to the prefix cache, where there is one.
        saved: what its pages get when it is admitted, instead of computing it; whoever runs the work that admits
            it writes them, and sets this to None.
    """

    tokens: list[int]
    max_length: int
    all_logits: bool = False
    n_computed: int = 0
    pages: list[int] = field(default_factory=list)
    trail: PrefixTrail | None = None
    saved: Saved | None = None

    @property
    def n_pending(self) -> int:
        """Tokens that have yet to be through the model; 1 while it decodes."""
        return len(self.tokens) - self.n_computed


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

    Invariants: `running` is ordered by age, everything in `waiting` that ran before is older than what did
    not, and waiting sequences own no pages.

    Args:
        allocator: the page pool.
        page_size: tokens of a page.
        max_batch: sequences that run at once.
        max_rows: row budget of a step; at least `max_batch`.
        max_context: tokens that a sequence may reach.
        prefix: finds pages of equal beginnings; None computes everything.
        export: copies the rows of a sequence that is about to lose its pages; None has them computed again.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        *,
        page_size: int,
        max_batch: int,
        max_rows: int,
        max_context: int,
        prefix: PrefixCache | None = None,
        export: Callable[[Sequence], Saved] | None = None,
    ):
        if max_rows < max_batch:
            raise ValueError(f"a row budget of {max_rows} cannot serve {max_batch} sequences a row each")
        self.allocator, self.prefix, self.export, self.page_size = allocator, prefix, export, page_size
        self.max_batch, self.max_rows, self.max_context = max_batch, max_rows, max_context
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def pages_for(self, n_tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-n_tokens // self.page_size)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            RequestTooLargeError: see `check`.
        """
        self.check(sequence)
        sequence.trail = None if self.prefix is None else self.prefix.trail()
        self.waiting.append(sequence)

    def check(self, sequence: Sequence) -> None:
        """Refuse a sequence that does not fit; queue nothing.

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

    def schedule(self) -> list[Work]:
        """The next step's rows, at most `max_rows`; empty when nothing waits or runs.

        Pages for these rows are in place when it returns, and sequences may have been admitted or preempted;
        `n_computed` does not change until `commit`.
        """
        before = self.preemptions
        budget = self.max_rows - sum(s.n_pending == 1 for s in self.running)
        work: list[Work] = []
        for sequence in list(self.running):
            decodes = sequence.n_pending == 1
            n_rows = 1 if decodes else min(sequence.n_pending, budget)
            if n_rows and self._make_room(sequence, sequence.n_computed + n_rows):
                budget -= 0 if decodes else n_rows
                work.append(Work(sequence, sequence.n_computed, n_rows))
        while self.preemptions == before and budget and (admitted := self._admit()):
            n_rows = min(admitted.n_pending, budget)
            self._make_room(admitted, admitted.n_computed + n_rows)
            budget -= n_rows
            work.append(Work(admitted, admitted.n_computed, n_rows))
        return work

    def _make_room(self, sequence: Sequence, length: int) -> bool:
        """Give a running sequence pages for `length` tokens, preempting the youngest ones until there are enough.

        Returns whether the sequence itself still runs.
        """
        while sequence in self.running:
            missing = self.pages_for(length) - len(sequence.pages)
            if missing <= self.allocator.free_count:
                sequence.pages += self.allocator.allocate(max(missing, 0))
                return True
            self._preempt(self.running[-1])
        return False

    def _preempt(self, victim: Sequence) -> None:
        if self.export is not None and victim.n_computed:
            victim.saved = self.export(victim)
        self.running.remove(victim)
        self._release(victim)
        self.waiting.appendleft(victim)
        self.preemptions += 1

    def _admit(self) -> Sequence | None:
        """Move the first waiting sequence to the running ones if there is room for all the tokens that it has."""
        if not self.waiting or len(self.running) == self.max_batch:
            return None
        sequence = self.waiting[0]
        reusable = 0 if sequence.all_logits else len(sequence.tokens) - 1
        found = live = 0
        if self.prefix is not None:
            found, live = self.prefix.peek(sequence.tokens, limit=reusable, trail=sequence.trail)
            if (found + 1) * self.page_size <= reusable and self._will_be_found(sequence.tokens, found):
                return None
        if self.pages_for(len(sequence.tokens)) - live > self.allocator.free_count:
            return None
        if self.prefix is not None:
            sequence.pages = self.prefix.match(sequence.tokens, limit=reusable, trail=sequence.trail)
        sequence.n_computed = len(sequence.pages) * self.page_size
        if sequence.saved is not None and sequence.saved.n_tokens > sequence.n_computed:
            sequence.n_computed = sequence.saved.n_tokens
            sequence.pages += self.allocator.allocate(self.pages_for(sequence.n_computed) - len(sequence.pages))
        self.running.append(self.waiting.popleft())
        return sequence

    def _will_be_found(self, tokens: list[int], page: int) -> bool:
        """Whether a running sequence is about to compute this page of these tokens, so that waiting pays."""
        end = (page + 1) * self.page_size
        return any(s.n_pending > 1 and s.n_computed < end and s.tokens[:end] == tokens[:end] for s in self.running)

    def commit(self, work: list[Work]) -> None:
        """Record that these rows have been through the model."""
        for sequence, start, n_rows in work:
            assert start == sequence.n_computed
            sequence.n_computed += n_rows
            if self.prefix is not None:
                self.prefix.store(sequence.tokens, sequence.pages, sequence.n_computed, sequence.trail)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not, and take its pages back."""
        sequence.saved = None
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.allocator.free(sequence.pages)
        sequence.pages, sequence.n_computed = [], 0
        if sequence.trail is not None:
            sequence.trail.n_stored = 0
