"""Scheduling without a model: budgets, order, admission, refusal."""

import subprocess
import sys

import numpy as np
import pytest

from oxjax.cache.allocator import PageAllocator
from oxjax.cache.prefix import PrefixCache, root_key
from oxjax.cache.states import StatePool
from oxjax.engine.config import EngineConfig
from oxjax.engine.scheduler import Scheduler, Sequence
from oxjax.errors import RequestTooLargeError


class NoDevice:
    """No contents: these tests are about counts alone."""

    def copy_page(self, source, target):
        pass

    def export(self, pages, slot, n_tokens):
        raise NotImplementedError

    restore = export


def make(*, pages=65, max_batch=4, max_rows=16, max_context=64, page_size=4, prefix=False):
    allocator = PageAllocator(pages)
    cache = PrefixCache(allocator, page_size, root_key(model="test")) if prefix else None
    pool = StatePool(NoDevice(), page_size=page_size, pages=allocator, prefix=cache)
    return Scheduler(pool, EngineConfig(1, max_batch=max_batch, max_rows=max_rows, max_context=max_context, swap=False))


def sequence(prompt, new=4):
    return Sequence(tokens=list(range(prompt)), max_length=prompt + new)


def run(scheduler, *, steps=10_000):
    """Play the engine: every sequence that reaches its end gets a token. Yields the rows of each step."""
    for _ in range(steps):
        work = scheduler.schedule()
        if not work:
            return
        assert sum(w.n_rows for w in work) <= scheduler.max_rows
        assert len(work) <= scheduler.max_batch
        scheduler.commit(work)
        yield work
        for item in work:
            if item.reaches_end:
                item.sequence.tokens.append(0)
                if len(item.sequence.tokens) == item.sequence.max_length:
                    scheduler.remove(item.sequence)
    raise AssertionError("the scheduler does not come to an end")


def test_a_long_prompt_runs_in_chunks_and_decodes_never_wait():
    scheduler = make(max_context=200, pages=200)
    short, long = sequence(3, 30), sequence(100, 2)
    scheduler.add(short)
    scheduler.add(long)
    rows = [{id(w.sequence): w.n_rows for w in work} for work in run(scheduler)]
    assert all(step.get(id(short)) == 1 for step in rows[1:9])
    assert [step[id(long)] for step in rows[:7]] == [13, 15, 15, 15, 15, 15, 12]


def test_first_come_first_served_within_batch_and_pages():
    scheduler = make(max_batch=2)
    first, second, third = (sequence(4) for _ in range(3))
    for s in (first, second, third):
        scheduler.add(s)
    assert [w.sequence for w in scheduler.schedule()] == [first, second]
    scheduler.remove(first)
    assert [w.sequence for w in scheduler.schedule()] == [second, third]


def test_a_sequence_waits_for_its_pages_and_nobody_overtakes_it():
    scheduler = make(pages=9, max_context=32, max_rows=64)
    big, bigger, small = sequence(16), sequence(24), sequence(1, 1)
    for s in (big, bigger, small):
        scheduler.add(s)
    assert {id(w.sequence) for w in scheduler.schedule()} == {id(big)}
    scheduler.remove(big)
    assert {id(w.sequence) for w in scheduler.schedule()} == {id(bigger), id(small)}


@pytest.mark.parametrize(
    "prompt,new,message", [(60, 5, "65, and the context holds 64"), (40, 20, "15 pages of 4, and the pool has 8")]
)
def test_what_can_never_fit_is_refused_with_the_numbers(prompt, new, message):
    scheduler = make(pages=9)
    with pytest.raises(RequestTooLargeError, match=message):
        scheduler.add(sequence(prompt, new))
    assert not scheduler.waiting


def test_removal_in_any_state_returns_all_pages():
    scheduler = make(max_batch=2)
    all_ = [sequence(20) for _ in range(4)]
    for s in all_:
        scheduler.add(s)
    scheduler.commit(scheduler.schedule())
    for s in all_:
        scheduler.remove(s)
    assert scheduler.pool.pages.used_count == 0
    assert not scheduler.schedule()


def test_scheduling_again_without_commit_changes_nothing():
    scheduler = make()
    scheduler.add(sequence(20))
    assert scheduler.schedule() == scheduler.schedule()


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_random_loads_finish_without_leaks(seed, prefix):
    rng = np.random.default_rng(seed)
    scheduler = make(pages=30, max_batch=5, max_rows=8, prefix=prefix)
    sequences = [sequence(int(rng.integers(2, 40)), int(rng.integers(1, 60))) for _ in range(60)]
    for s in sequences:
        s.max_length = min(s.max_length, 64)
        scheduler.add(s)
    begun = []
    for work in run(scheduler):
        begun += [w.sequence for w in work if w.sequence not in begun]
        assert all(len(w.sequence.state.pages) * 4 >= w.start + w.n_rows for w in work)
        assert all(s.state is None for s in scheduler.waiting)
    assert begun == sequences  # in the order they came, however often they were preempted later
    assert all(len(s.tokens) == s.max_length for s in sequences)
    assert scheduler.preemptions > 0
    assert scheduler.pool.pages.used_count == 0
    assert scheduler.pool.pages.free_count == scheduler.pool.pages.capacity
    assert not prefix or scheduler.pool.prefix.saved_tokens > 0  # all prompts count up from 0


def test_the_youngest_gives_way_and_comes_back_first():
    scheduler = make(pages=9, max_context=32, max_rows=64, max_batch=2)
    old, young, later = sequence(12, 20), sequence(12, 16), sequence(4, 4)
    for s in (old, young, later):
        scheduler.add(s)
    steps = run(scheduler)
    assert [w.sequence for w in next(steps)] == [old, young]
    while young in scheduler.running:
        next(steps)
    assert old in scheduler.running
    assert list(scheduler.waiting) == [young, later]
    list(steps)
    assert scheduler.pool.pages.used_count == 0


def test_what_wants_all_rows_reuses_nothing_but_is_found_by_others():
    scheduler = make(prefix=True, max_rows=64)
    scored = sequence(17, 0)
    scored.output_kind = "logits"
    plain = sequence(17, 1)
    scheduler.add(scored)
    scheduler.commit(scheduler.schedule())
    scheduler.remove(scored)
    again = sequence(17, 0)
    again.output_kind = "logits"
    scheduler.add(plain)
    scheduler.add(again)
    assert [(w.sequence is plain, w.start) for w in scheduler.schedule()] == [(True, 16), (False, 0)]


def test_a_beginning_that_many_share_is_computed_once():
    scheduler = make(prefix=True, max_rows=8, max_batch=4, pages=100)
    shared = [Sequence(tokens=[*range(20), 100 + i], max_length=23) for i in range(4)]
    for s in shared:
        scheduler.add(s)
    rows = {id(s): 0 for s in shared}
    for work in run(scheduler):
        for item in work:
            rows[id(item.sequence)] += item.n_rows
    assert list(rows.values()) == [22, 2, 2, 2]  # 21 tokens and a decode; then one token and a decode each


@pytest.mark.parametrize("length,found", [(1, 0), (3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (16, 12)])
def test_a_prompt_that_is_cached_whole_leaves_a_token_to_compute(length, found):
    scheduler = make(prefix=True, max_rows=64)
    for _ in range(2):
        s = sequence(length, 1)
        scheduler.add(s)
        (work,) = scheduler.schedule()
        scheduler.commit([work])
        scheduler.remove(s)
    assert (work.start, work.n_rows) == (found, length - found)


def test_host_truth_imports_no_jax():
    code = "import sys, oxjax.engine.scheduler, oxjax.cache.allocator; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
