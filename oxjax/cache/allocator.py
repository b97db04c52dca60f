"""Reference-counted allocator of pages, with cached pages and their eviction. Host only: no jax, no requests.

Slots of recurrent state are allocated in the same way; "page" stands for both here.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from oxjax.errors import CacheError, PoolExhaustedError

NULL_PAGE = 0  # padding rows write here; no sequence ever owns it, and slot 0 is the same for slots


class PageAllocator:
    """Allocator of equal pages, shared by reference counts; page 0 is never handed out.

    A page is *live* while it has references. A live page can be registered under a key that names its content (the
    hash of its prefix); without references it is then *cached*: it keeps the content, can be acquired again by its
    key, and is evicted when no *free* page, without references and key, is left.

    Every operation is all-or-nothing and takes O(1) amortised per page named.

    Invariants: a page is live, cached or free, and only one of these; a key is held by one page and a page holds one
    key at most; no page is evicted while a cached page continues it.

    Args:
        n_pages: pages of the device arrays, the null page included.
        unit: name of a page in error messages.

    Attributes:
        peak_used: largest number of pages that were live at once.
        evictions: cached pages that were handed out with their content lost.
    """

    def __init__(self, n_pages: int, unit: str = "page"):
        if n_pages < 2:
            raise CacheError(f"a pool of {n_pages} {unit}s has none to give: {unit} 0 is reserved, so at least 2")
        self._unit = unit
        self._refs = [0] * n_pages
        self._keys: list[bytes | None] = [None] * n_pages
        self._parent_keys: list[bytes | None] = [None] * n_pages
        self._page_of: dict[bytes, int] = {}
        self._free = list(range(n_pages - 1, NULL_PAGE, -1))
        # Cached pages: by age, or passed over by an eviction because a cached page continues them.
        self._lru: OrderedDict[int, None] = OrderedDict()
        self._held_by_child: set[int] = set()
        self._n_children: dict[bytes, int] = {}  # number of cached pages that continue a key; no zeros
        self.peak_used = 0
        self.evictions = 0

    @classmethod
    def empty(cls, unit: str = "page") -> PageAllocator:
        """Pool of a model without layers that use such pages; its capacity is 0."""
        pool = cls(2, unit)
        pool._refs.pop()
        pool._free.pop()
        return pool

    @property
    def capacity(self) -> int:
        """Number of pages that can be live at once."""
        return len(self._refs) - 1

    @property
    def free_count(self) -> int:
        """Number of pages that can be allocated now: free and cached ones."""
        return len(self._free) + self.cached_count

    @property
    def used_count(self) -> int:
        """Number of live pages."""
        return self.capacity - self.free_count

    @property
    def cached_count(self) -> int:
        """Number of cached pages: without references, with content that can be acquired again."""
        return len(self._lru) + len(self._held_by_child)

    def ref_count(self, page: int) -> int:
        """Number of references to a page; 0 if and only if it is free or cached."""
        self._check_ours(page)
        return self._refs[page]

    def is_registered(self, page: int) -> bool:
        """Return True if `lookup` finds this page by the key of its content."""
        self._check_ours(page)
        return self._keys[page] is not None

    def allocate(self, n: int) -> list[int]:
        """Allocate `n` pages with one reference each: free pages first, the most recently freed of them first.

        Then cached pages are evicted, the least recently used first. One that a cached page continues is passed over,
        and evicted as soon as none does: a prefix is evicted from its tail.

        Raises:
            PoolExhaustedError: fewer than `n` can be allocated; none was.
        """
        if n < 0:
            raise CacheError(f"{n} {self._unit}s wanted: not a number of {self._unit}s")
        if n > self.free_count:
            raise PoolExhaustedError(f"{n} {self._unit}s wanted, {self.free_count} of {self.capacity} free")
        pages = [self._free.pop() if self._free else self._evict() for _ in range(n)]
        for page in pages:
            self._refs[page] = 1
        self._note_peak()
        return pages

    def acquire(self, pages: Iterable[int]) -> None:
        """Add a reference to each of these live pages.

        Raises:
            CacheError: a page is foreign or free; none was acquired.
        """
        pages = list(pages)
        for page in pages:
            self._check_live(page)
        for page in pages:
            self._refs[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Drop a reference to each of these pages; those without any left become cached or free.

        The first page counts as the most recently used, so that the pages of a sequence, in order of position, are
        evicted from the last one on.

        Raises:
            CacheError: a page is foreign, free or named more often than it has references; none was freed.
        """
        pages = list(pages)
        for page, times in Counter(pages).items():
            self._check_live(page, "double free?")
            if times > self._refs[page]:
                raise CacheError(
                    f"{self._unit} {page} is named {times} times and has {self._refs[page]} references (twice?)"
                )
        for page in reversed(pages):
            self._refs[page] -= 1
            if not self._refs[page]:
                self._add_unused(page)

    def register(self, page: int, key: bytes, parent: int | None = None) -> int:
        """Register a live page under the key of its content; the page must not be written any more.

        A page has one key: a new one replaces the old one. A key has one page: the first to have it keeps it.

        Args:
            page: a live page.
            key: hash of this content and everything before it; a key always comes with the same parent key.
            parent: the registered page that this one continues, None at the beginning.

        Returns:
            The page that holds the key now: `page`, or another one that holds the same content.

        Raises:
            CacheError: `page` is not live or `parent` is not another registered page; nothing was changed.
        """
        self._check_live(page)
        parent_key = None
        if parent is not None:
            self._check_ours(parent)
            parent_key = self._keys[parent]
            if parent_key is None or parent == page:
                raise CacheError(
                    f"{self._unit} {page} cannot continue {self._unit} {parent}, which is not another with a key"
                )
        if self._keys[page] != key:
            self._erase_key(page)
            if (holder := self._page_of.get(key)) is not None:
                return holder
            self._page_of[key] = page
            self._keys[page], self._parent_keys[page] = key, parent_key
        return page

    def lookup(self, key: bytes) -> int | None:
        """The page that holds a key, or None. Changes nothing."""
        return self._page_of.get(key)

    def acquire_cached(self, key: bytes) -> int | None:
        """Add a reference to the page that holds a key, live or cached, or return None."""
        page = self._page_of.get(key)
        if page is None:
            return None
        if not self._refs[page]:
            self._leave_cached(page)
        self._refs[page] += 1
        self._note_peak()
        return page

    def forget(self, page: int) -> None:
        """Drop the key of a page, if it has one; a cached page is free then.

        Pages that continue it keep their keys, which name the whole prefix and so stay true. While nobody
        registers the dropped key again no prefix search reaches them, and they are evicted in their turn.

        Raises:
            CacheError: the page is foreign.
        """
        self._check_ours(page)
        if self._keys[page] is None:
            return
        if not self._refs[page]:
            self._leave_cached(page)
            self._free.append(page)
        self._erase_key(page)

    def _check_ours(self, page: int) -> None:
        if not NULL_PAGE < page < len(self._refs):
            raise CacheError(f"{self._unit} {page} is not one of 1..{self.capacity}")

    def _check_live(self, page: int, hint: str = "only acquire_cached brings back a free page") -> None:
        self._check_ours(page)
        if not self._refs[page]:
            raise CacheError(f"{self._unit} {page} is not in use ({hint})")

    def _note_peak(self) -> None:
        self.peak_used = max(self.peak_used, self.used_count)

    def _erase_key(self, page: int) -> None:
        if (key := self._keys[page]) is not None:
            del self._page_of[key]
            self._keys[page] = self._parent_keys[page] = None

    def _add_unused(self, page: int) -> None:
        if self._keys[page] is None:
            self._free.append(page)
            return
        self._lru[page] = None
        if (parent_key := self._parent_keys[page]) is not None:
            self._n_children[parent_key] = self._n_children.get(parent_key, 0) + 1

    def _leave_cached(self, page: int) -> None:
        """Take a page out of the cached ones; the page it continues is evicted next if it was passed over for it."""
        if page in self._held_by_child:
            self._held_by_child.remove(page)
        else:
            del self._lru[page]
        parent_key = self._parent_keys[page]
        if parent_key is None:
            return
        self._n_children[parent_key] -= 1
        if not self._n_children[parent_key]:
            del self._n_children[parent_key]
            parent = self._page_of.get(parent_key)
            if parent in self._held_by_child:
                self._held_by_child.remove(parent)
                self._lru[parent] = None
                self._lru.move_to_end(parent, last=False)

    def _evict(self) -> int:
        """Evict one cached page. Those in `_held_by_child` have cached children, so one that has none is in `_lru`."""
        while self._keys[page := next(iter(self._lru))] in self._n_children:
            del self._lru[page]
            self._held_by_child.add(page)
        self._leave_cached(page)
        self._erase_key(page)
        self.evictions += 1
        return page
