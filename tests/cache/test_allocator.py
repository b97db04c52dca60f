from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from oxjax.cache.allocator import NULL_PAGE, PageAllocator
from oxjax.errors import CacheError, PoolExhaustedError


def test_the_null_page_is_never_handed_out():
    pool = PageAllocator(5)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert NULL_PAGE == 0


def test_exhaustion_takes_nothing_and_names_the_numbers():
    pool = PageAllocator(5)
    pool.allocate(3)
    with pytest.raises(PoolExhaustedError, match="2 pages wanted, 1 of 4 free"):
        pool.allocate(2)
    assert pool.free_count == 1


@pytest.mark.parametrize("pages,message", [([9], "not one of"), ([0], "not one of"), ([-1], "not one of")])
def test_foreign_pages_are_refused(pages, message):
    pool = PageAllocator(5)
    taken = pool.allocate(2)
    with pytest.raises(CacheError, match=message):
        pool.free(taken + pages)
    assert pool.used_count == 2


def test_double_free_is_refused_in_one_call_and_in_two():
    pool = PageAllocator(5)
    page, *_ = pool.allocate(2)
    with pytest.raises(CacheError, match="twice"):
        pool.free([page, page])
    pool.free([page])
    with pytest.raises(CacheError, match="double free"):
        pool.free([page])


def test_last_freed_comes_first_and_peak_stays():
    pool = PageAllocator(10)
    first = pool.allocate(5)
    pool.free(first[1:3])
    assert pool.allocate(2) == first[1:3]
    pool.free(first)
    assert pool.peak_used == 5


def test_a_pool_of_the_null_page_alone_is_refused():
    with pytest.raises(CacheError):
        PageAllocator(1)


def test_an_empty_pool_has_nothing():
    pool = PageAllocator.empty()
    assert (pool.capacity, pool.free_count, pool.used_count, pool.cached_count) == (0, 0, 0, 0)
    assert pool.allocate(0) == []
    with pytest.raises(PoolExhaustedError):
        pool.allocate(1)
    with pytest.raises(CacheError):
        pool.acquire([1])


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=60))
def test_random_use_keeps_the_invariant(sizes):
    """Against a plain set: allocate on even steps, free the oldest on odd ones."""
    pool, owned, live = PageAllocator(33), [], set()
    for i, n in enumerate(sizes):
        if i % 2 and owned:
            pages = owned.pop(0)
            pool.free(pages)
            live -= set(pages)
        elif n <= 32 - len(live):
            pages = pool.allocate(n)
            assert len(set(pages)) == n
            assert not live & set(pages)
            owned.append(pages)
            live |= set(pages)
        else:
            with pytest.raises(PoolExhaustedError):
                pool.allocate(n)
        assert pool.used_count == len(live)
        assert pool.free_count + pool.used_count == pool.capacity == 32


def n_registered(pool):
    return sum(pool.is_registered(page) for page in range(1, pool.capacity + 1))


def cached_chain(pool, name, n):
    """`n` cached pages, each continuing the one before, under the keys `name` 0, 1, ..."""
    pages = pool.allocate(n)
    for i, page in enumerate(pages):
        assert pool.register(page, b"%s%d" % (name, i), pages[i - 1] if i else None) == page
    pool.free(pages)
    return pages


def test_the_first_pages_are_the_first_and_the_last_freed_is_the_next():
    pool = PageAllocator(9)
    assert pool.allocate(4) == [1, 2, 3, 4]
    pool.free([1])
    pool.free([3])
    assert pool.allocate(2) == [3, 1]
    assert pool.allocate(0) == []
    with pytest.raises(CacheError, match="-1 pages"):
        pool.allocate(-1)


def test_references_are_counted_and_the_last_one_frees():
    pool = PageAllocator(3)
    (page,) = pool.allocate(1)
    pool.acquire([page])
    pool.acquire([page, page])
    assert pool.ref_count(page) == 4
    pool.free([page, page, page])
    assert (pool.ref_count(page), pool.free_count) == (1, 1)
    with pytest.raises(CacheError, match="named 2 times and has 1"):
        pool.free([page, page])
    pool.free([page])
    assert (pool.ref_count(page), pool.free_count) == (0, 2)


def test_more_references_than_any_small_counter_holds():
    pool = PageAllocator(2)
    pages = pool.allocate(1) * 70_000
    pool.acquire(pages)
    assert pool.ref_count(1) == 70_001
    pool.free(pages)
    assert pool.ref_count(1) == 1


@pytest.mark.parametrize("page,message", [(2, "not in use"), (0, "not one of"), (5, "not one of"), (-1, "not one of")])
def test_only_live_pages_are_acquired_registered_or_freed(page, message):
    pool = PageAllocator(5)
    (live,) = pool.allocate(1)
    for call in (pool.acquire, pool.free):
        with pytest.raises(CacheError, match=message):
            call([live, page])
    with pytest.raises(CacheError, match=message):
        pool.register(page, b"key")
    assert pool.ref_count(live) == 1
    assert n_registered(pool) == 0


@pytest.mark.parametrize("page", [0, 5, -1])
def test_foreign_pages_have_no_count_and_no_key(page):
    pool = PageAllocator(5)
    for call in (pool.ref_count, pool.forget):
        with pytest.raises(CacheError, match="not one of"):
            call(page)


def test_a_cached_page_cannot_be_acquired_by_its_id():
    """It would be owned and free at once."""
    pool = PageAllocator(3)
    (page,) = cached_chain(pool, b"a", 1)
    with pytest.raises(CacheError, match="acquire_cached"):
        pool.acquire([page])
    with pytest.raises(CacheError, match="double free"):
        pool.free([page])


def test_free_pages_go_before_cached_ones():
    pool = PageAllocator(5)
    (page,) = cached_chain(pool, b"a", 1)
    assert page not in pool.allocate(3)
    assert (pool.lookup(b"a0"), pool.evictions) == (page, 0)
    assert (pool.cached_count, pool.free_count) == (1, 1)


def test_eviction_erases_the_key_and_is_counted():
    pool = PageAllocator(3)
    pages = cached_chain(pool, b"a", 2)
    assert pool.allocate(1) == [pages[1]]
    assert (pool.lookup(b"a1"), pool.lookup(b"a0"), pool.evictions, n_registered(pool)) == (None, pages[0], 1, 1)


def test_eviction_takes_the_least_recently_used_from_its_tail():
    pool = PageAllocator(9)
    old, new = cached_chain(pool, b"old", 3), cached_chain(pool, b"new", 3)
    pool.free([pool.acquire_cached(b"old0")])  # now the most recently used of all
    pool.allocate(2)
    assert pool.allocate(6) == [old[2], old[1], new[2], new[1], new[0], old[0]]


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (1, 2, 0)])
def test_no_page_goes_before_those_that_continue_it_however_they_were_freed(order):
    pool = PageAllocator(4)
    pages = pool.allocate(3)
    for i, page in enumerate(pages):
        pool.register(page, b"%d" % i, pages[i - 1] if i else None)
    for i in order:
        pool.free([pages[i]])
    assert pool.allocate(3) == pages[::-1]


def test_a_branching_prefix_goes_after_its_branches():
    pool = PageAllocator(4)
    stem, left, right = pool.allocate(3)
    pool.register(stem, b"s")
    pool.register(left, b"l", stem)
    pool.register(right, b"r", stem)
    pool.free([stem])
    pool.free([left])
    pool.free([right])
    assert pool.allocate(3) == [left, right, stem]


def test_a_page_passed_over_goes_next_once_nothing_continues_it():
    pool = PageAllocator(5)
    stem, leaf, a, b = pool.allocate(4)
    pool.register(stem, b"s")
    pool.register(leaf, b"l", stem)
    pool.register(a, b"a")
    pool.register(b, b"b")
    for page in (stem, a, leaf, b):
        pool.free([page])
    assert pool.allocate(1) == [a]  # stem is older, but leaf continues it
    assert pool.acquire_cached(b"l") == leaf
    assert pool.allocate(1) == [stem]
    assert pool.allocate(1) == [b]


def test_registration_is_idempotent_and_a_new_key_replaces_the_old():
    pool = PageAllocator(3)
    (page,) = pool.allocate(1)
    assert pool.register(page, b"a") == pool.register(page, b"a") == page
    assert pool.register(page, b"b") == page
    assert (pool.lookup(b"a"), pool.lookup(b"b"), n_registered(pool)) == (None, page, 1)


def test_the_first_page_with_a_content_keeps_its_key():
    pool = PageAllocator(4)
    first, second = pool.allocate(2)
    pool.register(first, b"a")
    assert pool.register(second, b"a") == first
    pool.free([second])
    assert pool.cached_count == 0
    assert pool.lookup(b"a") == first


def test_the_parent_must_have_a_key():
    pool = PageAllocator(4)
    first, second = pool.allocate(2)
    for parent in (first, second):
        with pytest.raises(CacheError, match="not another with a key"):
            pool.register(second, b"a", parent)
    with pytest.raises(CacheError, match="not one of"):
        pool.register(second, b"a", NULL_PAGE)
    assert n_registered(pool) == 0
    pool.register(first, b"a")
    with pytest.raises(CacheError, match="not another with a key"):
        pool.register(first, b"b", first)
    assert pool.lookup(b"a") == first


def test_hits_share_live_pages_and_resurrect_free_ones():
    pool = PageAllocator(4)
    (page,) = pool.allocate(1)
    pool.register(page, b"a")
    assert pool.acquire_cached(b"a") == page
    assert pool.ref_count(page) == 2
    pool.free([page, page])
    assert (pool.free_count, pool.cached_count) == (3, 1)
    assert pool.acquire_cached(b"a") == page
    assert (pool.ref_count(page), pool.free_count, pool.cached_count) == (1, 2, 0)
    assert page not in pool.allocate(2)


def test_a_miss_changes_nothing():
    pool = PageAllocator(4)
    cached_chain(pool, b"a", 2)
    assert pool.lookup(b"b") is pool.acquire_cached(b"b") is None
    assert (pool.free_count, pool.cached_count, pool.used_count, pool.peak_used) == (3, 2, 0, 2)


def test_the_peak_counts_resurrected_pages_and_never_falls():
    pool = PageAllocator(6)
    cached_chain(pool, b"a", 2)
    assert pool.peak_used == 2
    taken = pool.allocate(2)
    pool.acquire_cached(b"a0")
    assert pool.peak_used == 3
    pool.free(taken)
    assert pool.peak_used == 3


def test_a_forgotten_page_is_free_and_what_continues_it_is_evicted_in_turn():
    pool = PageAllocator(6)
    a, b = cached_chain(pool, b"a", 2), cached_chain(pool, b"b", 2)
    pool.forget(a[0])
    pool.forget(a[0])
    assert (pool.lookup(b"a0"), pool.cached_count, pool.free_count) == (None, 3, 5)
    assert pool.allocate(5) == [a[0], 5, a[1], b[1], b[0]]
    pool.register(a[0], b"c")
    pool.forget(a[0])
    pool.free([a[0]])
    assert pool.cached_count == 0


class Pool(RuleBasedStateMachine):
    """Any use at all, against dictionaries. Keys spell their prefix: the parent of `b"xy"` is `b"x"`."""

    N = 9

    def __init__(self):
        super().__init__()
        self.pool = PageAllocator(self.N)
        self.refs: Counter[int] = Counter()
        self.keys: dict[int, bytes] = {}
        self.unused = list(range(self.N - 1, 0, -1))
        self.freed_at: dict[int, int] = {}  # cached pages, by age
        self.passed: set[int] = set()
        self.clock = self.peak = self.evictions = 0

    def unblocked(self):
        """Cached pages that no cached page continues, the oldest first."""
        blocking = {self.keys[page][:-1] for page in self.freed_at}
        return [p for p in sorted(self.freed_at, key=self.freed_at.__getitem__) if self.keys[p] not in blocking]

    def expect_eviction(self, page):
        candidates = self.unblocked()
        held = self.passed & set(candidates)
        assert page in (held or candidates[:1])
        self.passed |= {p for p, t in self.freed_at.items() if t < self.freed_at[page] and p not in candidates}
        self.passed.discard(page)
        del self.freed_at[page], self.keys[page]
        self.evictions += 1

    @rule(n=st.integers(0, 5))
    def allocate(self, n):
        if n > len(self.unused) + len(self.freed_at):
            with pytest.raises(PoolExhaustedError):
                self.pool.allocate(n)
            return
        for page in self.pool.allocate(n):
            if self.unused:
                assert page == self.unused.pop()
            else:
                self.expect_eviction(page)
            self.refs[page] = 1

    @rule(pages=st.lists(st.integers(1, N - 1), max_size=4))
    def acquire(self, pages):
        if all(self.refs[page] for page in pages):
            self.pool.acquire(pages)
            self.refs.update(pages)
        else:
            with pytest.raises(CacheError):
                self.pool.acquire(pages)

    @rule(pages=st.lists(st.integers(1, N - 1), max_size=4))
    def free(self, pages):
        if not Counter(pages) <= self.refs:
            with pytest.raises(CacheError):
                self.pool.free(pages)
            return
        self.pool.free(pages)
        for page in reversed(pages):
            self.refs[page] -= 1
            if not self.refs[page] and page in self.keys:
                self.clock += 1
                self.freed_at[page] = self.clock
            elif not self.refs[page]:
                self.unused.append(page)

    @rule(data=st.data())
    def free_some(self, data):
        if live := sorted(self.refs.elements()):
            self.free(data.draw(st.lists(st.sampled_from(live), unique=True, max_size=6)))

    @rule(data=st.data(), letter=st.sampled_from([b"x", b"y"]))
    def register(self, data, letter):
        live = sorted(+self.refs)
        if not live:
            return
        page = data.draw(st.sampled_from(live))
        parent = data.draw(st.sampled_from([None, *(p for p, k in self.keys.items() if p != page and len(k) < 4)]))
        key = letter if parent is None else self.keys[parent] + letter
        holder = next((p for p, k in self.keys.items() if k == key), page)
        assert self.pool.register(page, key, parent) == holder
        if holder == page:
            self.keys[page] = key
        else:
            self.keys.pop(page, None)

    @rule(data=st.data())
    def acquire_cached(self, data):
        key = data.draw(st.sampled_from([b"nothing", *self.keys.values()]))
        page = self.pool.acquire_cached(key)
        assert page == next((p for p, k in self.keys.items() if k == key), None)
        if page is not None:
            self.refs[page] += 1
            self.freed_at.pop(page, None)
            self.passed.discard(page)

    @rule(page=st.integers(1, N - 1))
    def forget(self, page):
        self.pool.forget(page)
        self.keys.pop(page, None)
        self.passed.discard(page)
        if self.freed_at.pop(page, None):
            self.unused.append(page)

    @invariant()
    def same_as_the_model(self):
        used = len(+self.refs)
        self.peak = max(self.peak, used)
        assert {page: self.pool.ref_count(page) for page in range(1, self.N)} == {
            page: self.refs[page] for page in range(1, self.N)
        }
        assert {key: self.pool.lookup(key) for key in self.keys.values()} == {k: p for p, k in self.keys.items()}
        assert n_registered(self.pool) == len(self.keys)
        assert (self.pool.used_count, self.pool.cached_count) == (used, len(self.freed_at))
        assert self.pool.free_count == len(self.unused) + len(self.freed_at) == self.pool.capacity - used
        assert (self.pool.peak_used, self.pool.evictions) == (self.peak, self.evictions)


TestPool = Pool.TestCase
TestPool.settings = settings(derandomize=True, deadline=None, max_examples=60, stateful_step_count=50)


@pytest.mark.slow
class TestPoolLong(Pool.TestCase):
    settings = settings(derandomize=True, deadline=None, max_examples=1000, stateful_step_count=150)
