"""Scheduler: decides the rows that run next. Host only: no jax, no model, no sampling.

Sequences have ranks: first come, first served, where a level of priority counts as having come `HEAD_START`
steps earlier; so nobody is overtaken for ever. A step takes one row of every sequence that decodes, then fills
its row budget with chunks of prompts, best rank first. State is taken as a sequence grows. When none is left,
the running sequence of the worst rank gives all of its state up and waits, the state kept on the host or to be
computed again; so the best one always moves, and everything ends. What was computed stays findable by content
until its place is needed; a sequence waits while another computes the beginning that they share.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from oxjax.cache.prefix import BlockHashes
from oxjax.cache.states import SequenceState, StatePool, SwappedState
from oxjax.engine.config import EngineConfig
from oxjax.errors import PoolExhaustedError, RequestTooLargeError

HEAD_START = 256  # steps


@dataclass(eq=False)
class Sequence:
    """One sequence on the host.

    Attributes:
        tokens: the prompt and everything generated so far.
        max_length: length at which it ends at the latest.
        output_kind: output of its rows, if it generates nothing: "logits", "hidden" or "scores".
        next_output_row: the first row whose output is still to come.
        fork_at: number of tokens after which a step ends, so that others can fork from there; 0 is nowhere.
        reserved_seqs: sequences of the batch that are kept for it: itself and those that will fork from it.
        priority: each level puts it before sequences that came up to `HEAD_START` steps earlier.
        state: of its first tokens on the device; None while it waits.
        swapped: the same on the host, for when it is admitted.
        block_hashes: hashes of its full pages, for the prefix cache.
        rank: its place in the order of service; smaller goes first.
    """

    tokens: list[int]
    max_length: int
    output_kind: str | None = None
    next_output_row: int = 0
    fork_at: int = 0
    reserved_seqs: int = 1
    priority: int = 0
    state: SequenceState | None = None
    swapped: SwappedState | None = None
    block_hashes: BlockHashes = field(default_factory=BlockHashes)
    rank: tuple[int, ...] = (0, 0)

    @property
    def n_computed(self) -> int:
        """Tokens that its state is the state of."""
        return 0 if self.state is None else self.state.position

    @property
    def n_pending(self) -> int:
        """Tokens that have yet to be through the model; 1 while it decodes."""
        return len(self.tokens) - self.n_computed

    @property
    def n_reusable(self) -> int:
        """Tokens whose state may be found instead of computed: all before the first row that is needed."""
        n = len(self.tokens) - 1 if self.output_kind is None else self.next_output_row
        return min(n, self.fork_at - 1) if self.fork_at else n


class ScheduledChunk(NamedTuple):
    """Rows of one sequence in a step: its tokens from `start` to `start + n_rows`."""

    sequence: Sequence
    start: int
    n_rows: int

    @property
    def decodes(self) -> bool:
        """It is the one row that the next token is sampled from."""
        return self.n_rows == 1 and self.chooses

    @property
    def stop(self) -> int:
        """Tokens that the sequence has state for when it is done."""
        return self.start + self.n_rows

    @property
    def reaches_end(self) -> bool:
        """It computes the last token of the sequence."""
        return self.stop == len(self.sequence.tokens)

    @property
    def chooses(self) -> bool:
        """The next token is sampled from the last row's logits."""
        return self.reaches_end and self.sequence.output_kind is None


class Scheduler:
    """Decides what runs, and when sequences get and lose their state.

    Invariants: `running` is ordered by rank, nobody who waits has a better rank than somebody who was admitted
    after them, and those who wait have no state on the device.

    Args:
        pool: of pages and slots.
        config: sizes of the engine.
    """

    def __init__(self, pool: StatePool, config: EngineConfig):
        self.pool, self.swap = pool, config.swap
        self.max_batch, self.max_rows, self.max_context = config.max_batch, config.max_rows, config.max_context
        self.running: list[Sequence] = []
        self.preemptions = self.steps = 0
        self._queue: list[tuple[tuple[int, ...], Sequence]] = []  # a heap; those that left are skipped
        self._queued: set[Sequence] = set()
        self._serial = count()

    @property
    def waiting(self) -> list[Sequence]:
        """Those that wait, best rank first."""
        return sorted(self._queued, key=_rank)

    @property
    def n_waiting(self) -> int:
        """Number of waiting sequences."""
        return len(self._queued)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            RequestTooLargeError: see `check`.
        """
        self.check(sequence)
        sequence.rank = self.steps - HEAD_START * sequence.priority, next(self._serial)
        sequence.block_hashes = self.pool.prefix.block_hashes()
        self._push(sequence)

    def check(self, sequence: Sequence) -> None:
        """Refuse a sequence that does not fit; queue nothing.

        Raises:
            RequestTooLargeError: it could never run, however empty the pool.
        """
        length, limit = sequence.max_length, self.max_context
        if length > limit:
            made, less = f"{length} tokens", "shorten the text"
            if n_new := length - len(sequence.tokens):
                made = f"{length - n_new} prompt tokens and up to {n_new} new ones make {length}"
                less = "shorten the prompt, lower max_tokens"
            raise RequestTooLargeError(f"{made}, and the context holds {limit}: {less} or raise max_context")
        if (needed := self.pool.pages_for(length)) > self.pool.pages.capacity:
            raise RequestTooLargeError(
                f"{length} tokens need {needed} pages of {self.pool.page_size}, and the pool has "
                f"{self.pool.pages.capacity}"
            )

    def fork(self, parent: Sequence, *children: Sequence) -> None:
        """Take in sequences that begin as another does, with as much of that one's state as there is.

        Args:
            parent: a sequence that is here, or was.
            children: new ones; their tokens are a beginning of the parent's, possibly followed by others after the
                part that the parent has computed.

        Raises:
            RequestTooLargeError: see `check`; none is taken in.
        """
        for child in children:
            self.check(child)
        swapped = parent.swapped
        for child in children:
            child.rank = *parent.rank[:2], next(self._serial)
            child.block_hashes = self.pool.prefix.block_hashes()
            if parent.state is not None and len(self.running) < self.max_batch:
                child.state = self.pool.fork(parent.state)
                child.block_hashes = child.state.block_hashes
                child.block_hashes.cut(parent.n_computed // self.pool.page_size)
                insort(self.running, child, key=_rank)
            else:
                if swapped is None and parent.state is not None:
                    swapped = self._export(parent)
                child.swapped = swapped
                self._push(child)
            self.rewind(child)

    def rewind(self, sequence: Sequence) -> None:
        """Bring the state of a sequence back to before the last of its tokens, of which there are fewer than before.

        A recurrence goes back to the last kept state, and what lies between is computed again. A sequence that had
        left is queued again.
        """
        limit = len(sequence.tokens) - 1
        if sequence.state is not None:
            if sequence.state.position > limit:
                self.pool.truncate(sequence.state, max(p for p in self.pool.positions(sequence.state) if p <= limit))
        elif sequence not in self._queued:
            self.add(sequence)
        elif sequence.swapped is not None:
            sequence.swapped = sequence.swapped.cut(limit)
        sequence.block_hashes.cut(len(sequence.tokens) // self.pool.page_size)

    def schedule(self) -> list[ScheduledChunk]:
        """The next step's rows, at most `max_rows`; empty when nothing waits or runs.

        State for these rows is in place when it returns, and sequences may have been admitted or preempted;
        `n_computed` does not change until `commit`.
        """
        self._let_better_ranks_in()
        before = self.preemptions
        budget = self.max_rows - sum(s.n_pending == 1 for s in self.running)
        work: list[ScheduledChunk] = []
        for sequence in list(self.running):
            if sequence.state is None:  # it had to give way to one before it
                continue
            n_rows = 1 if sequence.n_pending == 1 else self._chunk(sequence, budget)
            if n_rows and self._make_room(sequence, sequence.n_computed + n_rows):
                budget -= 0 if sequence.n_pending == 1 else n_rows
                work.append(ScheduledChunk(sequence, sequence.n_computed, n_rows))
        while self.preemptions == before and budget and (admitted := self._admit()):
            n_rows = self._chunk(admitted, budget)
            self._make_room(admitted, admitted.n_computed + n_rows)
            budget -= n_rows
            work.append(ScheduledChunk(admitted, admitted.n_computed, n_rows))
        return work

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        n_rows = min(sequence.n_pending, budget)
        if sequence.n_computed < sequence.fork_at:
            n_rows = min(n_rows, sequence.fork_at - sequence.n_computed)
        return self.pool.rows_at_most(sequence.state, n_rows)

    def _make_room(self, sequence: Sequence, length: int) -> bool:
        """Give a running sequence state for `length` tokens, preempting the worst ranks until there is enough.

        Returns whether the sequence itself still runs.
        """
        while sequence.state is not None:
            try:
                self.pool.reserve(sequence.state, length)
            except PoolExhaustedError:
                self._preempt(self.running[-1])
            else:
                return True
        return False

    def _let_better_ranks_in(self) -> None:
        """Admit those that wait with a better rank than somebody who runs, preempting the worst ranks for them."""
        while self.running and (first := self._first()) is not None and first.rank < self.running[-1].rank:
            if self._will_be_found(first):
                return
            if self._admit() is None:
                self._preempt(self.running[-1])

    def _preempt(self, victim: Sequence) -> None:
        victim.swapped = self._export(victim)
        self.running.remove(victim)
        self._release(victim)
        self._push(victim)
        self.preemptions += 1

    def swap_out(self, sequence: Sequence) -> None:
        """Move a running sequence out, its state to the host, until `requeue`; one that does not run stays."""
        if sequence.state is not None:
            sequence.swapped = self._export(sequence)
            self.running.remove(sequence)
            self._release(sequence)

    def requeue(self, sequence: Sequence) -> None:
        """Queue a sequence that was swapped out; one that was not is left alone."""
        if sequence.state is None and sequence not in self._queued:
            self._push(sequence)

    def _export(self, sequence: Sequence) -> SwappedState | None:
        return self.pool.export(sequence.state) if self.swap and sequence.n_computed else None

    def _push(self, sequence: Sequence) -> None:
        self._queued.add(sequence)
        heapq.heappush(self._queue, (sequence.rank, sequence))

    def _first(self) -> Sequence | None:
        while self._queue and not (self._queue[0][1] in self._queued and self._queue[0][0] == self._queue[0][1].rank):
            heapq.heappop(self._queue)
        return self._queue[0][1] if self._queue else None

    def _can_admit(self, sequence: Sequence) -> bool:
        """The batch has a place for it, and the pool room for all its tokens."""
        if self.running and sum(s.reserved_seqs for s in self.running) + sequence.reserved_seqs > self.max_batch:
            return False
        return self.pool.fits(sequence.tokens, limit=sequence.n_reusable, block_hashes=sequence.block_hashes)

    def _admit(self) -> Sequence | None:
        """Move the first that waits to the running ones, if there is room and waiting longer does not pay."""
        if len(self.running) == self.max_batch or (sequence := self._first()) is None:
            return None
        if self._will_be_found(sequence) or not self._can_admit(sequence):
            return None
        sequence.state = self.pool.open(
            sequence.tokens, limit=sequence.n_reusable, block_hashes=sequence.block_hashes, swapped=sequence.swapped
        )
        sequence.swapped = None
        heapq.heappop(self._queue)
        self._queued.remove(sequence)
        insort(self.running, sequence, key=_rank)
        return sequence

    def _will_be_found(self, sequence: Sequence) -> bool:
        """A running sequence is about to compute the prefix that this one needs next, so that waiting pays."""
        missing = self.pool.prefix.next_missing(
            sequence.tokens, limit=sequence.n_reusable, block_hashes=sequence.block_hashes
        )
        if missing is None:
            return False
        end, block_hash = missing
        page = end // self.pool.page_size - 1
        return any(
            s.n_pending > 1 and s.n_computed < end <= len(s.tokens) and s.block_hashes.at(s.tokens, page) == block_hash
            for s in self.running
        )

    def reserve_ahead(self, work: list[ScheduledChunk], n_steps: int) -> int:
        """Give sequences that decode state for several steps at once, as far as nobody has to give way for it.

        Args:
            work: what `schedule` gave, a row each.
            n_steps: steps that are wanted.

        Returns:
            Steps that there is state for, 1 at least; a sequence may end before.
        """
        pool = self.pool
        n_steps = min(pool.rows_at_most(w.sequence.state, n_steps) for w in work)
        while n_steps > 1:
            lengths = [(w.sequence.state, min(w.start + n_steps, w.sequence.max_length - 1)) for w in work]
            lengths = [(state, length) for state, length in lengths if pool.pages_for(length) > len(state.pages)]
            if sum(pool.pages_for(length) - len(state.pages) for state, length in lengths) <= pool.n_free_pages:
                for state, length in lengths:
                    pool.reserve(state, length)
                break
            n_steps //= 2
        return n_steps

    def commit(self, work: list[ScheduledChunk], n_steps: int = 1) -> None:
        """Record that these rows have been through the model, in so many steps."""
        self.steps += n_steps
        for sequence, start, n_rows in work:
            assert start == sequence.n_computed
            self.pool.advance(sequence.state, sequence.tokens, n_rows)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not, and take its state back. One that is not here is left alone."""
        sequence.swapped = None
        if sequence.state is not None:
            self.running.remove(sequence)
            self._release(sequence)
        self._queued.discard(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.state)
        sequence.state = None

    def __iter__(self) -> Iterator[Sequence]:
        """All sequences: those that run, then those that wait, best rank first."""
        return iter((*self.running, *self.waiting))


def _rank(sequence: Sequence) -> tuple[int, ...]:
    return sequence.rank
