"""One interface for pages and slots: what it hands out, what it refuses, and that refusals change nothing."""

import pytest

from oxjax.cache.allocator import PageAllocator
from oxjax.cache.prefix import PrefixCache
from oxjax.cache.states import StatePool
from oxjax.errors import CacheError, CannotTruncate, PoolExhaustedError, StaleHandleError, WrongKindError
from tests.helpers.world import KINDS, ROOT, Contents, hashes

PAGE, EVERY = 4, 8
TOKENS = list(range(100, 140))


def make(kind, *, n_pages=12, n_slots=8, reuse=True):
    paged, recurrent = KINDS[kind]
    pages = PageAllocator(n_pages + 1) if paged else None
    slots = PageAllocator(n_slots + 1, "slot") if recurrent else None
    prefix = PrefixCache(pages, PAGE, ROOT, slots=slots, checkpoint_every=EVERY) if reuse else None
    device = Contents(PAGE, paged=paged, recurrent=recurrent)
    return StatePool(device, page_size=PAGE, pages=pages, slots=slots, prefix=prefix)


def compute(pool, state, n, tokens=TOKENS):
    """What an engine does for `n` more tokens, no step beyond a checkpoint."""
    while n:
        rows = pool.rows_at_most(state, n)
        pool.reserve(state, state.position + rows)
        expected = hashes(tokens)
        for i in range(state.position, state.position + rows):
            if pool.is_paged:
                pool.device.cells[pool.device.cell(state.pages, i)] = expected[i]
        if pool.is_recurrent:
            pool.device.slots[state.next_slot] = expected[state.position + rows - 1]
        pool.advance(state, tokens, rows)
        n -= rows
    return state


def used(pool):
    return tuple(p.used_count for p in (pool.pages, pool.slots))


def check(pool, state, tokens=TOKENS):
    """The state is what its tokens say."""
    swapped = pool.export(state)
    expected = hashes(tokens)[: state.position]
    assert not pool.is_paged or swapped.rows[0].tolist() == expected
    assert not pool.is_recurrent or [v.item() for v in swapped.values] == expected[-1:]


@pytest.mark.parametrize("kind", KINDS)
def test_life_of_a_sequence(kind):
    pool = make(kind)
    state = compute(pool, pool.open(), 19)
    assert state.position == 19
    check(pool, state)
    pool.release(state)
    assert not any(used(pool))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 7, 8, 9, 16, 19])
def test_forks_share_until_they_write(kind, n):
    pool = make(kind, n_pages=20)
    parent = compute(pool, pool.open(), n)
    before = used(pool)
    children = [pool.fork(parent) for _ in range(3)]
    assert used(pool) == before
    others = [TOKENS[:n] + [7 + i] * 9 for i in range(3)]
    for child, tokens in zip(children, others, strict=True):
        compute(pool, child, 9, tokens)
    compute(pool, parent, 9)
    check(pool, parent)
    for child, tokens in zip(children, others, strict=True):
        check(pool, child, tokens)
    for state in (parent, *children):
        pool.release(state)
    assert not any(used(pool))


@pytest.mark.parametrize("n", range(20))
def test_attention_goes_back_anywhere(n):
    pool = make("paged")
    state = compute(pool, pool.open(), 19)
    assert list(pool.positions(state)) == list(range(20))
    pool.truncate(state, n)
    assert (state.position, len(state.pages)) == (n, -(-n // PAGE))
    other = TOKENS[:n] + [3] * 20
    check(pool, compute(pool, state, 8, other), other)


@pytest.mark.parametrize("kind", ["recurrent", "hybrid"])
def test_a_recurrence_goes_back_to_what_was_kept_or_says_where_it_can(kind):
    pool = make(kind)
    state = compute(pool, pool.open(), 19)
    assert pool.positions(state) == [0, 8, 16, 19]
    with pytest.raises(CannotTruncate, match="position 17; there is one for 0, 8, 16, 19") as error:
        pool.truncate(state, 17)
    assert (error.value.target, error.value.available) == (17, (0, 8, 16, 19))
    check(pool, state)
    for n in (19, 16, 8, 0):
        pool.truncate(state, n)
        assert state.position == n
        check(pool, state)
    check(pool, compute(pool, state, 11))


@pytest.mark.parametrize("kind", ["recurrent", "hybrid"])
def test_without_checkpoints_a_recurrence_goes_back_to_the_beginning_alone(kind):
    pool = make(kind, reuse=False)
    state = compute(pool, pool.open(), 19)
    assert pool.positions(state) == [0, 19]
    with pytest.raises(CannotTruncate):
        pool.truncate(state, 8)
    pool.truncate(state, 0)
    check(pool, compute(pool, state, 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [-1, 20, 1000])
def test_nothing_goes_beyond_its_position(kind, n):
    pool = make(kind)
    state = compute(pool, pool.open(), 19)
    with pytest.raises(CannotTruncate, match=f"position {n};"):
        pool.truncate(state, n)
    check(pool, state)


@pytest.mark.parametrize("kind", KINDS)
def test_to_stay_is_to_change_nothing(kind):
    pool = make(kind)
    state = compute(pool, pool.open(), 19)
    before = (list(state.pages), state.slot, dict(pool.device.cells), dict(pool.device.slots))
    pool.truncate(state, 19)
    assert before == (state.pages, state.slot, pool.device.cells, pool.device.slots)


def test_checkpoints_are_found_only_where_every_layer_has_its_state():
    pool = make("hybrid")
    pool.release(compute(pool, pool.open(), 19))
    again = pool.open(TOKENS, limit=18)
    assert again.position == 16
    check(pool, again)
    pool.release(again)
    kept = pool.prefix.checkpoints(19, again.block_hashes)
    pool.slots.forget(kept[16])
    assert pool.open(TOKENS, limit=18).position == 8


def test_the_budget_of_checkpoints_is_kept_and_the_oldest_goes_first():
    pool = make("recurrent", n_slots=5)
    for i in range(4):
        pool.release(compute(pool, pool.open(), 16, [i] * 16))
    assert pool.slots.cached_count <= 5
    assert pool.slots.evictions >= 3
    assert pool.open([3] * 20, limit=19).position == 16
    assert pool.open([0] * 20, limit=19).position == 0


@pytest.mark.parametrize("kind", KINDS)
def test_exports_come_back_in_another_pool(kind):
    source, target = make(kind), make(kind, n_pages=30)
    swapped = source.export(compute(source, source.open(), 19))
    state = target.open(TOKENS, swapped=swapped)
    assert state.position == 19
    check(target, compute(target, state, 5))


@pytest.mark.parametrize("kind,other", [("paged", "hybrid"), ("hybrid", "paged"), ("recurrent", "paged")])
def test_state_of_another_kind_is_refused(kind, other):
    source, target = make(kind), make(other)
    swapped = source.export(compute(source, source.open(), 19))
    with pytest.raises(WrongKindError, match="page arrays"):
        target.open(TOKENS, swapped=swapped)
    assert not any(used(target))


@pytest.mark.parametrize("kind", KINDS)
def test_stale_and_foreign_handles_are_refused(kind):
    pool, other = make(kind), make(kind)
    stale = compute(pool, pool.open(), 5)
    pool.release(stale)
    for handle, where in ((stale, pool), (compute(pool, pool.open(), 5), other)):
        for use in (
            lambda: where.reserve(handle, 9),  # noqa: B023
            lambda: where.advance(handle, TOKENS, 1),  # noqa: B023
            lambda: where.fork(handle),  # noqa: B023
            lambda: where.truncate(handle, 0),  # noqa: B023
            lambda: where.export(handle),  # noqa: B023
            lambda: where.release(handle),  # noqa: B023
        ):
            with pytest.raises(StaleHandleError, match=r"released|another pool"):
                use()


@pytest.mark.parametrize("kind", KINDS)
def test_exhaustion_takes_nothing(kind):
    pool = make(kind, n_pages=4, n_slots=2)
    state = compute(pool, pool.open(), 7)
    pool.fork(state)
    allocator = pool.pages if pool.is_paged else pool.slots
    blocker = allocator.allocate(allocator.free_count)
    before = used(pool)
    with pytest.raises(PoolExhaustedError):
        pool.reserve(state, 15)
    assert used(pool) == before
    allocator.free(blocker)
    check(pool, compute(pool, state, 1))


def test_a_copy_that_fails_takes_nothing(monkeypatch):
    pool = make("paged")
    state = compute(pool, pool.open(), 7)
    pool.fork(state)
    before = used(pool)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(pool.device, "copy_page", lambda source, target: 1 / 0)
        pool.reserve(state, 9)
    assert used(pool) == before
    check(pool, compute(pool, state, 2))


def test_a_slot_at_another_position_is_noticed():
    pool = make("hybrid")
    state = compute(pool, pool.open(), 7)
    pool._slot_positions[state.slot] = 6
    pool.reserve(state, 8)
    with pytest.raises(CacheError, match=r"slot \d is at position 6, and its sequence at 7"):
        pool.advance(state, TOKENS, 1)


def test_checkpoints_lie_on_pages():
    with pytest.raises(CacheError, match="multiple of the page"):
        PrefixCache(None, 4, ROOT, slots=PageAllocator(3), checkpoint_every=6)
