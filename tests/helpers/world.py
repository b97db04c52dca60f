"""A scheduler and its pool on a device that remembers what is in every cell, so that any mix-up shows.

A key at position `i` depends on all tokens up to `i`, and so does a recurrent state: here both *are* a hash of
those tokens. Before a step reads, every cell and slot is compared with what its tokens say.
"""

import random
from collections import Counter
from itertools import accumulate

import numpy as np

from oxjax.cache.allocator import PageAllocator
from oxjax.cache.prefix import PrefixCache, root_key
from oxjax.cache.states import SLOTS_PER_SEQUENCE, StatePool, SwappedState
from oxjax.engine.config import EngineConfig
from oxjax.engine.scheduler import ScheduledChunk, Scheduler, Sequence

ROOT = root_key(model="world")
KINDS = {"paged": (True, False), "recurrent": (False, True), "hybrid": (True, True)}


def hashes(tokens):
    """One number for each beginning of the tokens, shortest first."""
    return list(accumulate(tokens, lambda h, t: hash((h, t)) & (2**62 - 1), initial=7))[1:]


class Contents:
    """The device of a pool: cells and slots hold hashes."""

    def __init__(self, page_size, *, paged, recurrent):
        self.page_size, self.paged, self.recurrent = page_size, paged, recurrent
        self.cells: dict[tuple[int, int], int] = {}
        self.slots: dict[int, int] = {}
        self.copies = 0

    def copy_page(self, source, target):
        self.copies += 1
        for offset in range(self.page_size):
            self.cells[target, offset] = self.cells.get((source, offset), 0)

    def cell(self, pages, i):
        return pages[i // self.page_size], i % self.page_size

    def export(self, pages, slot, n_tokens):
        rows = [np.array([self.cells[self.cell(pages, i)] for i in range(n_tokens)])] if self.paged else []
        return SwappedState(n_tokens, rows, [] if slot is None else [np.array(self.slots[slot])])

    def restore(self, pages, slot, swapped, first):
        for i, row in enumerate(swapped.rows[0][first:] if self.paged else []):
            self.cells[self.cell(pages, i)] = int(row)
        if self.recurrent:
            self.slots[slot] = int(swapped.values[0])

    def run(self, work):
        """A step: everything is read, and checked, before anything is written."""
        read, written = set(), {}
        for sequence, start, n_rows in work:
            state, expected = sequence.state, hashes(sequence.tokens)
            assert state.position == start
            if self.paged:
                assert [self.cells[self.cell(state.pages, i)] for i in range(start)] == expected[:start]
                for i in range(start, start + n_rows):
                    cell = self.cell(state.pages, i)
                    assert cell not in written, "two rows in one cell"
                    written[cell] = expected[i]
            if self.recurrent:
                assert (state.slot is None) == (start == 0)
                if start:
                    assert self.slots[state.slot] == expected[start - 1]
                    read.add(state.slot)
                assert state.next_slot not in written
                written[state.next_slot] = expected[start + n_rows - 1]
        assert not read & set(written)
        for place, value in written.items():
            (self.slots if isinstance(place, int) else self.cells)[place] = value


class World:
    """Sequences come, grow, fork, go back, are cancelled, fail; every operation ends with all invariants checked."""

    PAGE, EVERY, CONTEXT = 4, 8, 28

    def __init__(self, kind, *, swap=True, reuse=True, n_pages=14, max_batch=4, max_rows=5, n_checkpoints=4):
        paged, recurrent = KINDS[kind]
        self.device = Contents(self.PAGE, paged=paged, recurrent=recurrent)
        pages = PageAllocator(n_pages + 1) if paged else None
        slots = PageAllocator(1 + SLOTS_PER_SEQUENCE * max_batch + n_checkpoints, "slot") if recurrent else None
        prefix = PrefixCache(pages, self.PAGE, ROOT, slots=slots, checkpoint_every=self.EVERY) if reuse else None
        self.pool = StatePool(self.device, page_size=self.PAGE, pages=pages, slots=slots, prefix=prefix)
        sizes = EngineConfig(n_pages + 1, self.PAGE, max_batch, max_rows, self.CONTEXT, swap=swap)
        self.scheduler = Scheduler(self.pool, sizes)
        self.live: list[Sequence] = []
        self.finished: list[Sequence] = []
        self.counts = Counter()

    def add(self, tokens, n_new, *, priority=0, all_logits=False):
        n_new = 0 if all_logits else min(n_new, self.CONTEXT - len(tokens))
        sequence = Sequence(
            list(tokens), len(tokens) + n_new, output_kind="logits" if all_logits else None, priority=priority
        )
        self.scheduler.add(sequence)
        self.live.append(sequence)
        return self.check("add")

    def step(self, choose, *, fails=False, n_steps=1):
        """One step; `choose` gives new tokens. One that fails has run on the device and advances nobody.

        With `n_steps` the device takes up to so many at once, if everybody decodes. A 1 ends a sequence before the
        call's last step; what the device computed after it is never read.
        """
        work = self.scheduler.schedule()
        assert bool(work) == bool(self.live)
        assert sum(w.n_rows for w in work) <= self.scheduler.max_rows
        running = {w.sequence for w in work}
        assert running <= set(self.scheduler.running)
        decoding = [s for s in self.scheduler.running if s.n_pending == 1 and s.n_computed]
        assert all(s in running for s in decoding), "a decoding sequence missed a step"
        if self.live:
            best = min(self.live, key=lambda s: s.rank)
            assert best in running or self.scheduler._will_be_found(best), "the best rank did not move"
        if n_steps > 1 and work and len(work) == len(self.scheduler.running) and all(w.decodes for w in work):
            return self._decode(work, choose, self.scheduler.reserve_ahead(work, n_steps), fails)
        self.device.run(work)
        if fails:
            return self.check("failed step")
        self.scheduler.commit(work)
        for item in work:
            sequence, reaches_end = item.sequence, item.reaches_end
            if item.chooses:
                sequence.tokens.append(choose())
            if reaches_end and len(sequence.tokens) == sequence.max_length:
                self.scheduler.remove(sequence)
                self.live.remove(sequence)
                self.finished.append(sequence)
        return self.check("step")

    def _decode(self, work, choose, n_steps, fails):
        taken = []
        for sequence, start, _ in work:
            new = [choose() for _ in range(min(n_steps, sequence.max_length - len(sequence.tokens)))]
            n_rows = next((i for i, token in enumerate(new, 1) if token), len(new))
            sequence.tokens += new[:-1]
            taken.append((sequence, start, len(new), n_rows, new[n_rows - 1]))
        self.device.run([ScheduledChunk(sequence, start, n) for sequence, start, n, *_ in taken])
        for sequence, start, _, n_rows, _ in taken:
            del sequence.tokens[start + (1 if fails else n_rows) :]
        if fails:
            return self.check("failed step")
        chunks = [ScheduledChunk(sequence, start, n_rows) for sequence, start, _, n_rows, _ in taken]
        self.scheduler.commit(chunks, n_steps)
        for sequence, _, n, n_rows, last in taken:
            sequence.tokens.append(last)
            if n_rows < n or len(sequence.tokens) == sequence.max_length:
                self.scheduler.remove(sequence)
                self.live.remove(sequence)
                self.finished.append(sequence)
        self.counts["several steps"] += n_steps > 1
        self.counts["ended inside"] += any(n_rows < n for _, _, n, n_rows, _ in taken)
        return self.check("step")

    def fork(self, parent, length, n_new, *, more=()):
        tokens = parent.tokens[:length] + list(more)
        child = Sequence(tokens, min(len(tokens) + n_new, self.CONTEXT), priority=parent.priority)
        self.scheduler.fork(parent, child)
        self.live.append(child)
        return self.check("fork")

    def rewind(self, sequence, length):
        if sequence not in self.live:
            self.finished.remove(sequence)
            self.live.append(sequence)
        del sequence.tokens[length:]
        self.scheduler.rewind(sequence)
        return self.check("rewind")

    def cancel(self, sequence):
        self.scheduler.remove(sequence)
        self.live.remove(sequence)
        return self.check("cancel")

    def check(self, what):
        self.counts[what] += 1
        scheduler, pool = self.scheduler, self.pool
        running, waiting = scheduler.running, scheduler.waiting
        assert len(running) <= scheduler.max_batch
        assert sorted(map(id, self.live)) == sorted(map(id, (*running, *waiting)))
        assert [s.rank for s in running] == sorted(s.rank for s in running)
        assert all(s.state is not None and s.swapped is None for s in running)
        assert all(s.state is None for s in waiting)
        assert all(s.n_computed < len(s.tokens) for s in self.live)
        refs = Counter(page for s in running for page in s.state.pages)
        assert all(pool.pages.ref_count(p) == refs[p] for p in range(1, pool.pages.capacity + 1))
        held = Counter(x for s in running for x in (s.state.slot, s.state.next_slot) if x is not None)
        assert all(pool.slots.ref_count(x) == held[x] for x in range(1, pool.slots.capacity + 1))
        return self

    def drain(self, choose, limit=2000):
        for _ in range(limit):
            if not self.live:
                break
            self.step(choose)
        assert not self.live, "it does not come to an end"
        assert self.pool.pages.used_count == 0
        assert self.pool.slots.used_count == 0


def play(world: World, rng: random.Random, n: int) -> None:
    """Random operations, weighted so that pools fill, prefixes repeat and everything happens often."""

    def token():
        return int(rng.random() < 0.3)

    for _ in range(n):
        choice = rng.random()
        if choice < 0.2 and len(world.live) < 12:
            tokens = [token() for _ in range(rng.randint(1, 14))]
            world.add(tokens, rng.randint(1, 10), priority=rng.choice([0, 0, 0, 1, -1]), all_logits=rng.random() < 0.1)
        elif choice < 0.3 and (world.live or world.finished):
            parent = rng.choice(world.live + world.finished[-3:])
            length = rng.choice([rng.randint(1, len(parent.tokens)), len(parent.tokens)])
            if length < world.CONTEXT - 1:
                more = [token()] if length == len(parent.tokens) and rng.random() < 0.5 else []
                world.fork(parent, length, rng.randint(1, 8), more=more)
        elif choice < 0.37:
            candidates = [s for s in world.live + world.finished[-3:] if s.output_kind is None]
            if candidates:
                sequence = rng.choice(candidates)
                world.rewind(sequence, rng.randint(1, len(sequence.tokens)))
                if len(sequence.tokens) == sequence.max_length:
                    world.cancel(sequence)
        elif choice < 0.41 and world.live:
            world.cancel(rng.choice(world.live))
        elif choice < 0.46:
            world.step(token, fails=True, n_steps=rng.choice([1, 3]))
        else:
            world.step(token, n_steps=rng.choice([1, 1, 2, 7]))
