"""Scheduler, prefix cache and pool together, under thousands of random operations on every kind of state."""

import random

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from oxjax.cache.allocator import PageAllocator
from oxjax.cache.states import StatePool
from oxjax.engine.config import EngineConfig
from oxjax.engine.scheduler import HEAD_START, ScheduledChunk, Scheduler, Sequence
from tests.helpers.world import KINDS, Contents, World, play

CASES = [(kind, swap, reuse) for kind in KINDS for swap in (True, False) for reuse in (True, False)]


@pytest.mark.parametrize("kind,swap,reuse", CASES)
def test_random_operations_never_mix_anything_up(kind, swap, reuse):
    rng = random.Random(f"{kind} {swap} {reuse}")
    world = World(kind, swap=swap, reuse=reuse)
    for _ in range(4):
        play(world, rng, 700)
        world.drain(lambda: int(rng.random() < 0.3))
    assert min(world.counts[what] for what in ("add", "fork", "rewind", "cancel", "failed step")) > 50
    assert min(world.counts[what] for what in ("several steps", "ended inside")) > 20
    assert world.scheduler.preemptions > 10
    if kind != "recurrent":
        assert world.device.copies > 5
    if reuse:
        assert world.pool.prefix.saved_tokens > 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind,swap,reuse", CASES)
def test_many_more_random_operations(kind, swap, reuse, seed):
    rng = random.Random(f"{kind} {swap} {reuse} {seed}")
    world = World(kind, swap=swap, reuse=reuse, n_pages=rng.randint(10, 20), max_batch=rng.randint(1, 5))
    play(world, rng, 5000)
    world.drain(lambda: int(rng.random() < 0.3))


class Machine(RuleBasedStateMachine):
    """The same world, driven by hypothesis, which looks for the shortest way to break it."""

    @initialize(case=st.sampled_from(CASES), max_batch=st.integers(1, 4), n_pages=st.integers(10, 14))
    def begin(self, case, max_batch, n_pages):
        kind, swap, reuse = case
        self.world = World(kind, swap=swap, reuse=reuse, max_batch=max_batch, n_pages=n_pages)

    def pick(self, i, *, done=True):
        known = [s for s in self.world.live + self.world.finished[-3:] * done if s.output_kind is None]
        return known[i % len(known)] if known else None

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        n_new=st.integers(1, 8),
        priority=st.sampled_from([0, 1, -1]),
        all_logits=st.booleans(),
    )
    def add(self, tokens, n_new, priority, all_logits):
        self.world.add(tokens, n_new, priority=priority, all_logits=all_logits)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=12, max_size=12), fails=st.booleans(), n_steps=st.integers(1, 3))
    def step(self, tokens, fails, n_steps):
        self.world.step(tokens.pop, fails=fails, n_steps=n_steps)

    @rule(i=st.integers(0, 20), length=st.integers(1, 22), n_new=st.integers(1, 6))
    def fork(self, i, length, n_new):
        if (parent := self.pick(i)) is not None:
            self.world.fork(parent, min(length, len(parent.tokens)), n_new)

    @rule(i=st.integers(0, 20), length=st.integers(1, 22))
    def rewind(self, i, length):
        sequence = self.pick(i)
        if sequence is not None and min(length, len(sequence.tokens)) < sequence.max_length:
            self.world.rewind(sequence, min(length, len(sequence.tokens)))

    @rule(i=st.integers(0, 20))
    def cancel(self, i):
        if (sequence := self.pick(i, done=False)) is not None:
            self.world.cancel(sequence)

    def teardown(self):
        self.world.drain(lambda: 0)


TestMachine = Machine.TestCase
TestMachine.settings = settings(derandomize=True, deadline=None, max_examples=60, stateful_step_count=40)


class TestTheWorldCanFail:
    """Each defect, made on purpose, is noticed."""

    def played(self, kind):
        world, rng = World(kind), random.Random(1)
        for _ in range(4):
            play(world, rng, 700)
            world.drain(lambda: int(rng.random() < 0.3))

    def test_a_page_written_without_a_copy(self, monkeypatch):
        monkeypatch.setattr("oxjax.cache.states.StatePool._shared", lambda self, state: [])
        with pytest.raises((AssertionError, KeyError)):
            self.played("paged")

    def test_a_slot_written_in_place(self, monkeypatch):
        from oxjax.cache.states import StatePool

        reserve = StatePool.reserve

        def in_place(self, state, length):
            reserve(self, state, length)
            if state.slot is not None:
                self.slots.free([state.next_slot])
                self.slots.acquire([state.slot])
                state.next_slot = state.slot

        monkeypatch.setattr(StatePool, "reserve", in_place)
        with pytest.raises(AssertionError):
            self.played("recurrent")

    def test_a_checkpoint_one_token_off(self, monkeypatch):
        from oxjax.cache.prefix import PrefixCache

        store = PrefixCache.store_checkpoint
        monkeypatch.setattr(
            PrefixCache,
            "store_checkpoint",
            lambda self, tokens, slot, position, hashes: store(self, [*tokens, 0], slot, position + 1, hashes),
        )
        with pytest.raises(Exception):  # noqa: B017
            self.played("hybrid")

    def test_a_page_that_is_found_by_what_it_held(self, monkeypatch):
        rewound_and_asked_for_the_old()
        monkeypatch.setattr("oxjax.cache.allocator.PageAllocator.forget", lambda self, page: None)
        with pytest.raises(AssertionError):
            rewound_and_asked_for_the_old()


def rewound_and_asked_for_the_old():
    """A sequence goes back into a full page and writes other tokens there; then somebody wants the old ones."""
    world = World("paged", max_rows=12)
    world.add([0] * 9, 5)
    world.step(lambda: 1)
    (first,) = world.live
    world.rewind(first, 6)
    world.step(lambda: 1)  # its seventh token is another now, and the second page not yet full again
    world.step(lambda: 1)
    world.add([0] * 9, 3)
    world.drain(lambda: 0)


def test_a_long_prompt_never_delays_a_decoding_neighbour():
    """32k tokens in chunks: the neighbour gets its token in every single step."""
    pool = StatePool(Contents(16, paged=True, recurrent=False), page_size=16, pages=PageAllocator(3000))
    scheduler = Scheduler(pool, EngineConfig(n_pages=1, max_batch=4, max_rows=256, max_context=40_000))
    short, long = Sequence([1, 2, 3], 400), Sequence([5] * 32_768, 32_770)
    scheduler.add(short)
    scheduler.commit(scheduler.schedule())
    short.tokens.append(0)
    scheduler.add(long)
    steps = 0
    while long.n_pending > 1:
        rows = {w.sequence: w.n_rows for w in scheduler.schedule()}
        assert rows == {short: 1, long: min(255, long.n_pending)}
        scheduler.commit([ScheduledChunk(s, s.n_computed, n) for s, n in rows.items()])
        short.tokens.append(0)
        steps += 1
        if long.n_pending == 0:
            long.tokens.append(0)
    assert steps == -(-32_768 // 255)


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 5))])
def test_nobody_starves_under_random_arrivals(seed):
    """More arrives than can be served, most of it with more priority: what may go before somebody is bounded."""
    rng = random.Random(seed)
    world = World("hybrid", max_batch=2)
    lowest = None
    for i in range(3 * HEAD_START):
        world.add([rng.randint(0, 1) for _ in range(rng.randint(1, 6))], rng.randint(1, 4), priority=rng.randint(0, 1))
        if i == 10:
            world.add([1, 1, 0], 3, priority=-1)
            lowest = world.live[-1]
        world.step(lambda: rng.randint(0, 1))
    assert len(world.live) > 100
    world.drain(lambda: 0)
    # Ranks are served in order, but for those that run beside each other: none that came much later went before.
    before = world.finished[: world.finished.index(lowest)]
    assert max(s.rank for s in before) < (lowest.rank[0] + 20, 0)
    assert len(before) > HEAD_START


def test_a_higher_priority_takes_the_place_of_a_lower_one():
    world = World("hybrid", max_batch=1)
    world.add([0, 1, 0], 8)
    world.step(lambda: 0)
    world.add([1, 1, 1], 2, priority=1)
    low, high = world.live
    world.step(lambda: 0)
    assert world.scheduler.running == [high]
    assert low.swapped is not None
    world.drain(lambda: 0)
    assert world.finished == [high, low]
    assert world.scheduler.preemptions == 1
