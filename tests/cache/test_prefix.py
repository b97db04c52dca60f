import random
import struct
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from oxjax.cache import prefix
from oxjax.cache.allocator import PageAllocator
from oxjax.cache.prefix import BlockHashes, PrefixCache, hash_page, root_key
from oxjax.errors import CacheError, PoolExhaustedError

ROOT = root_key(model="test")
SIZE = 4


def make(n_pages=33):
    return PrefixCache(PageAllocator(n_pages), SIZE, ROOT)


def page_hashes(tokens, page_size, root):
    hashes, n_full = BlockHashes(root, page_size), len(tokens) // page_size
    if n_full:
        hashes.at(tokens, n_full - 1)
    return hashes.hashes


def n_registered(pool):
    return sum(pool.is_registered(page) for page in range(1, pool.capacity + 1))


class Owner:
    """What a scheduler does for one sequence: match, allocate the rest, compute, store, free."""

    def __init__(self, cache, tokens, *, root=None):
        self.cache, self.tokens, self.block_hashes = cache, list(tokens), cache.block_hashes(root)
        self.shared = cache.match(self.tokens, limit=len(self.tokens) - 1, block_hashes=self.block_hashes).pages
        self.n_computed = len(self.shared) * SIZE
        try:
            self.pages = self.shared + cache.allocator.allocate(-(-len(self.tokens) // SIZE) - len(self.shared))
        except PoolExhaustedError:
            cache.allocator.free(self.shared)
            raise

    def compute(self, n=None):
        self.n_computed = len(self.tokens) if n is None else min(self.n_computed + n, len(self.tokens))
        self.cache.store(self.tokens, self.pages, self.n_computed, self.block_hashes)
        return self

    def finish(self):
        self.cache.allocator.free(self.pages)


def test_one_key_per_full_page_and_none_for_the_rest():
    assert [len(page_hashes(list(range(n)), 4, ROOT)) for n in (0, 3, 4, 7, 8, 9)] == [0, 0, 1, 1, 2, 2]
    assert {len(key) for key in page_hashes(list(range(8)), 4, ROOT)} == {32}


def test_equal_prefixes_have_equal_keys_up_to_the_first_difference():
    a = page_hashes([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], 4, ROOT)
    b = page_hashes([1, 2, 3, 4, 5, 6, 7, 0, 9, 10, 11, 12], 4, ROOT)
    assert [x == y for x, y in zip(a, b, strict=True)] == [True, False, False]


def test_equal_pages_at_different_depths_have_different_keys():
    assert len(set(page_hashes([1, 2, 3, 4] * 5, 4, ROOT))) == 5


def test_keys_are_the_same_in_every_process():
    code = "from oxjax.cache.prefix import *; print(BlockHashes(root_key(model='m'), 4).at(range(16), 3).hex())"
    printed = {subprocess.check_output([sys.executable, "-c", code], text=True).strip() for _ in range(2)}
    assert printed == {page_hashes(range(16), 4, root_key(model="m"))[-1].hex()}


def test_roots_differ_with_any_field_and_so_do_keys():
    fields = [("a", "bc", ""), ("ab", "c", ""), ("abc", "", ""), ("a", "", "bc"), ("", "abc", ""), ("", "", "abc")]
    roots = [root_key(model=model, adapter=adapter, salt=salt) for model, adapter, salt in fields]
    assert roots[2] == root_key(model="abc")
    assert len(set(roots)) == len({page_hashes([1, 2], 2, root)[0] for root in roots}) == len(fields)


def test_a_root_is_not_the_key_of_a_page():
    first, second = page_hashes([1, 2, 3, 4], 2, ROOT)
    assert page_hashes([3, 4], 2, first) != [second]
    assert page_hashes([3, 4], 2, b"") != page_hashes([3, 4], 2, bytes(32))
    root = bytes(24)
    alike = struct.pack("<Q", len(root)) + root  # what is hashed before the first tokens
    assert hash_page([3, 4], ROOT, alike) != hash_page([3, 4], root, None)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=12), st.lists(st.integers(0, 3), max_size=12))
@settings(derandomize=True, deadline=None)
def test_any_token_ids_make_keys_and_different_ones_differ(a, b):
    assert (page_hashes(a, 1, ROOT) == page_hashes(b, 1, ROOT)) == (a == b)


def test_200_pages_are_hashed(report):
    tokens, best = list(range(200 * 16)), 1.0
    for _ in range(20):
        begin = time.perf_counter()
        keys = page_hashes(tokens, 16, ROOT)
        best = min(best, time.perf_counter() - begin)
    assert len(set(keys)) == 200
    report(f"keys of 200 pages of 16 tokens: {best * 1e6:.0f} us")


def test_host_truth_imports_no_jax():
    code = "import sys, oxjax.cache.prefix; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_page_without_tokens_is_refused():
    with pytest.raises(CacheError, match="0 tokens"):
        PrefixCache(PageAllocator(2), 0, ROOT)


@pytest.mark.parametrize("length", [1, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE, 2 * SIZE + 1, 5 * SIZE])
def test_a_repeated_prompt_shares_all_pages_but_leaves_a_token_to_compute(length):
    cache = make()
    first = Owner(cache, range(length)).compute()
    first.finish()
    for _ in range(2):  # the third request finds what the second did
        again = Owner(cache, range(length))
        assert again.shared == first.pages[: (length - 1) // SIZE]
        assert length - again.n_computed in range(1, SIZE + 1)
        again.compute().finish()
    assert cache.allocator.used_count == 0


def test_pages_are_shared_between_live_sequences_and_not_beyond_what_they_have_in_common():
    cache = make()
    a = Owner(cache, [*range(8), 1, 1, 1, 1, 1]).compute()
    b = Owner(cache, [*range(8), 2, 2, 2, 2, 2]).compute()
    c = Owner(cache, [9, *range(1, 12)]).compute()
    assert b.shared == a.pages[:2]
    assert not c.shared
    assert [cache.allocator.ref_count(page) for page in a.pages] == [2, 2, 1, 1]
    assert not set(b.pages[2:]) & set(a.pages + c.pages)


def test_the_match_stops_at_the_first_gap():
    cache = make()
    Owner(cache, range(16)).compute().finish()
    second = cache.allocator.lookup(page_hashes(range(16), SIZE, ROOT)[1])
    cache.allocator.forget(second)
    assert len(cache.match(range(16), limit=16, block_hashes=cache.block_hashes()).pages) == 1


def test_only_full_pages_of_computed_tokens_are_stored():
    cache = make()
    owner = Owner(cache, range(10))
    sizes = []
    for _ in range(5):
        owner.compute(2)
        sizes.append(n_registered(cache.allocator))
    assert sizes == [0, 1, 1, 2, 2]
    owner.finish()
    assert cache.allocator.cached_count == 2


def test_each_page_is_hashed_once(monkeypatch):
    hashed = []
    plain = prefix.hash_page
    monkeypatch.setattr(prefix, "hash_page", lambda *args: hashed.append(args[0]) or plain(*args))
    cache = make()
    Owner(cache, range(8)).compute().finish()
    hashed.clear()
    block_hashes = cache.block_hashes()
    for _ in range(3):
        assert cache.peek(range(20), limit=19, block_hashes=block_hashes) == (8, 0)
    pages = cache.match(range(20), limit=19, block_hashes=block_hashes).pages + cache.allocator.allocate(3)
    for n in range(8, 21):
        cache.store(range(20), pages, n, block_hashes)
    assert [list(chunk) for chunk in hashed] == [list(range(i, i + 4)) for i in range(0, 20, 4)]


def test_peek_takes_and_counts_nothing():
    cache = make()
    a = Owner(cache, range(8)).compute()
    Owner(cache, range(16)).compute().finish()
    before, counts = cache.allocator.free_count, (cache.hits, cache.misses)
    assert cache.peek(range(16), limit=15, block_hashes=cache.block_hashes()) == (12, 2)
    assert cache.allocator.free_count == before
    assert (cache.hits, cache.misses) == counts
    a.finish()
    assert cache.peek(range(16), limit=15, block_hashes=cache.block_hashes()) == (12, 0)


def test_sequences_that_computed_the_same_end_up_on_the_same_pages():
    cache = make()
    twins = [Owner(cache, range(13)) for _ in range(3)]  # none could know of the others
    assert cache.allocator.used_count == 12
    for twin in twins:
        twin.compute()
    assert twins[0].pages[:3] == twins[1].pages[:3] == twins[2].pages[:3]
    assert len({twin.pages[3] for twin in twins}) == 3
    assert cache.allocator.used_count == 6
    for twin in twins:
        twin.finish()
    assert (cache.allocator.used_count, cache.allocator.cached_count) == (0, 3)


def test_a_live_sequence_keeps_its_prefix_whatever_the_pressure():
    cache = make(9)
    a, b = Owner(cache, range(9)), Owner(cache, range(9))
    a.compute()
    b.compute()
    a.finish()
    cache.allocator.allocate(cache.allocator.free_count)
    assert cache.peek(range(9), limit=8, block_hashes=cache.block_hashes()) == (8, 2)


def test_roots_keep_sequences_apart():
    cache = make()
    Owner(cache, range(9)).compute()
    assert not Owner(cache, range(9), root=root_key(model="test", adapter="lora:0.5")).shared
    salted = root_key(model="test", salt="tenant")
    Owner(cache, range(9), root=salted).compute()
    assert len(Owner(cache, range(9), root=salted).shared) == 2


def test_counters_count():
    cache = make(5)
    Owner(cache, range(9)).compute().finish()
    Owner(cache, range(14)).compute().finish()
    assert (cache.hits, cache.misses, cache.saved_tokens) == (2, 2 + 1, 8)
    assert (n_registered(cache.allocator), cache.allocator.evictions) == (3, 0)
    Owner(cache, range(100, 110)).compute().finish()
    assert (n_registered(cache.allocator), cache.allocator.evictions) == (3, 2)
    cache.match([], limit=-1, block_hashes=cache.block_hashes())
    assert cache.misses == 5


def test_without_a_cache_nothing_is_counted():
    pool = PageAllocator(9)
    for _ in range(3):
        pool.free(pool.allocate(5))
    assert (pool.evictions, pool.cached_count, n_registered(pool)) == (0, 0, 0)


def test_preemption_and_return_find_the_own_pages():
    cache = make()
    owner = Owner(cache, range(14)).compute(9)
    pages = owner.pages[:2]
    owner.finish()
    assert cache.match(owner.tokens, limit=13, block_hashes=owner.block_hashes) == (8, pages, None)
    assert owner.block_hashes.n_stored == 2


def test_preemption_and_return_after_eviction_stores_again():
    cache = make(5)
    owner = Owner(cache, range(14)).compute()
    owner.finish()
    pages = cache.allocator.allocate(4)
    assert not cache.match(owner.tokens, limit=13, block_hashes=owner.block_hashes).pages
    cache.store(owner.tokens, pages, 14, owner.block_hashes)
    assert cache.peek(owner.tokens, limit=13, block_hashes=cache.block_hashes()) == (12, 3)


def test_a_limit_beyond_the_tokens_is_no_more_than_all():
    cache = make()
    owner = Owner(cache, range(9)).compute()
    assert cache.match(owner.tokens, limit=100, block_hashes=cache.block_hashes()).pages == owner.pages[:2]
    assert cache.misses == 2


@pytest.mark.parametrize("n_computed,n_pages,n_tokens", [(7, 4, 16), (16, 3, 16), (13, 4, 12)])
def test_impossible_progress_is_refused(n_computed, n_pages, n_tokens):
    cache = make()
    owner = Owner(cache, range(16)).compute(8)
    with pytest.raises(CacheError, match=f"{n_computed} computed of {n_tokens} tokens on {n_pages} pages"):
        cache.store(owner.tokens[:n_tokens], owner.pages[:n_pages], n_computed, owner.block_hashes)


def test_nothing_is_stored_after_a_forgotten_page():
    cache = make()
    owner = Owner(cache, range(16)).compute(8)
    cache.allocator.forget(owner.pages[1])
    owner.compute()
    assert n_registered(cache.allocator) == 1
    owner.finish()
    assert cache.allocator.cached_count == 1


class Prefixes(RuleBasedStateMachine):
    """Sequences come, grow, share and go; a cache of tuples says which pages each must get, exactly."""

    N = 12

    def __init__(self):
        super().__init__()
        self.cache = PrefixCache(PageAllocator(self.N), 2, ROOT)
        self.page_of: dict[tuple, int] = {}  # prefix -> page
        self.refs: Counter[int] = Counter()
        self.unused = list(range(self.N - 1, 0, -1))
        self.lru: list[int] = []
        self.sequences: list[tuple[list[int], list[int], BlockHashes]] = []
        self.evicted: list[tuple] = []

    def drop(self, page):
        self.refs[page] -= 1
        if not self.refs[page]:
            (self.lru if page in self.page_of.values() else self.unused).append(page)

    def take(self):
        if self.unused:
            page = self.unused.pop()
        else:
            page = self.lru.pop(0)
            begin = next(p for p, q in self.page_of.items() if q == page)
            del self.page_of[begin]
            self.evicted.append(begin)
        self.refs[page] = 1
        return page

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10), whole=st.booleans())
    def start(self, tokens, whole):
        expected = []
        while (end := 2 * len(expected) + 2) <= len(tokens) - 1 and tuple(tokens[:end]) in self.page_of:
            expected.append(self.page_of[tuple(tokens[:end])])
        block_hashes = self.cache.block_hashes()
        live = sum(self.refs[page] > 0 for page in expected)
        assert self.cache.peek(tokens, limit=len(tokens) - 1, block_hashes=block_hashes) == (2 * len(expected), live)
        needed = -(-len(tokens) // 2)
        if needed - live > self.cache.allocator.free_count:
            return
        assert self.cache.match(tokens, limit=len(tokens) - 1, block_hashes=block_hashes) == (
            2 * len(expected),
            expected,
            None,
        )
        for page in expected:
            self.refs[page] += 1
        self.lru = [page for page in self.lru if not self.refs[page]]
        fresh = self.cache.allocator.allocate(needed - len(expected))
        assert fresh == [self.take() for _ in fresh]
        self.sequences.append((tokens, expected + fresh, block_hashes))
        if whole:
            self.store(len(self.sequences) - 1, len(tokens))

    @rule(i=st.integers(0, 5), n=st.integers(0, 10))
    def store(self, i, n):
        if i >= len(self.sequences):
            return
        tokens, pages, block_hashes = self.sequences[i]
        n = min(max(n, 2 * block_hashes.n_stored), len(tokens))
        expected = list(pages)
        for j in range(block_hashes.n_stored, n // 2):
            holder = self.page_of.setdefault(tuple(tokens[: 2 * j + 2]), pages[j])
            if holder != pages[j]:
                self.refs[holder] += 1
                self.lru = [page for page in self.lru if page != holder]
                self.drop(pages[j])
                expected[j] = holder
        self.cache.store(tokens, pages, n, block_hashes)
        assert pages == expected

    @rule(i=st.integers(0, 5))
    def finish(self, i):
        if i < len(self.sequences):
            _, pages, _ = self.sequences.pop(i)
            self.cache.allocator.free(pages)
            for page in reversed(pages):
                self.drop(page)

    @invariant()
    def same_as_the_model(self):
        pool = self.cache.allocator
        assert Counter(page for _, pages, _ in self.sequences for page in pages) == +self.refs
        assert [pool.ref_count(page) for page in range(1, self.N)] == [self.refs[page] for page in range(1, self.N)]
        assert n_registered(pool) == len(self.page_of)
        for begin, page in self.page_of.items():
            assert pool.lookup(page_hashes(begin, 2, ROOT)[-1]) == page
            assert len(begin) == 2 or begin[:-2] in self.page_of  # no page is left without what it continues
        assert (pool.cached_count, pool.evictions) == (len(self.lru), len(self.evicted))
        assert pool.free_count == len(self.unused) + len(self.lru) == self.N - 1 - len(+self.refs)
        ages = {page: age for age, page in enumerate(self.lru)}
        for begin, page in self.page_of.items():
            chain = [ages.get(self.page_of[begin[:n]], self.N) for n in range(2, len(begin) + 1, 2)]
            assert page not in ages or all(a >= b for a, b in pairwise(chain))  # leaves before parents


TestPrefixes = Prefixes.TestCase
TestPrefixes.settings = settings(derandomize=True, deadline=None, max_examples=100, stateful_step_count=50)


@pytest.mark.slow
class TestPrefixesLong(Prefixes.TestCase):
    settings = settings(derandomize=True, deadline=None, max_examples=1000, stateful_step_count=150)


@pytest.mark.parametrize("seed", range(3))
def test_a_long_random_run_agrees_with_the_model(seed):
    """Thousands of operations on one pool, so that it ages as it does in service."""
    rng, model = random.Random(seed), Prefixes()
    for _ in range(3000):
        choice = rng.random()
        if choice < 0.45:
            model.start([int(rng.random() < 0.3) for _ in range(rng.randint(1, 10))], rng.random() < 0.5)
        elif choice < 0.6:
            model.store(rng.randint(0, 5), rng.randint(0, 10))
        else:
            model.finish(rng.randint(0, 3))
        model.same_as_the_model()
    assert len(model.evicted) > 500
    assert model.cache.hits > 500
