import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oxjax.cache.blocks import NULL_PAGE, PageAllocator
from oxjax.errors import CacheError, OutOfPagesError


def test_the_null_page_is_never_handed_out():
    pool = PageAllocator(5)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert NULL_PAGE == 0


def test_exhaustion_takes_nothing_and_names_the_numbers():
    pool = PageAllocator(5)
    pool.allocate(3)
    with pytest.raises(OutOfPagesError, match="2 pages wanted, 1 of 4 free"):
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


def test_an_empty_pool_is_refused():
    with pytest.raises(CacheError):
        PageAllocator(1)


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
            with pytest.raises(OutOfPagesError):
                pool.allocate(n)
        assert pool.used_count == len(live)
        assert pool.free_count + pool.used_count == pool.capacity == 32
