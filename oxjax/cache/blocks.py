"""Host truth about pages: who owns which. No jax here, and no requests."""

from __future__ import annotations

from collections.abc import Iterable

from oxjax.errors import CacheError, OutOfPagesError

NULL_PAGE = 0  # padding rows write here; no sequence ever owns it


class PageAllocator:
    """A pool of equal pages; page 0 is never handed out. All operations are all-or-nothing.

    Invariant: `free_count + used_count == capacity`, and a page is free or owned, never both.

    Args:
        n_pages: pages of the device arrays, the null page included.
    """

    def __init__(self, n_pages: int):
        if n_pages < 2:
            raise CacheError(f"a pool of {n_pages} pages has none to give: page 0 is reserved, so at least 2")
        self._free = list(range(n_pages - 1, NULL_PAGE, -1))
        self._owned = bytearray(n_pages)
        self.peak_used = 0

    @property
    def capacity(self) -> int:
        """Pages that can be owned at once."""
        return len(self._owned) - 1

    @property
    def free_count(self) -> int:
        """Pages that can be allocated now."""
        return len(self._free)

    @property
    def used_count(self) -> int:
        """Pages that are owned now."""
        return self.capacity - self.free_count

    def allocate(self, n: int) -> list[int]:
        """Take `n` pages, the most recently freed first.

        Raises:
            OutOfPagesError: fewer than `n` are free; none was taken.
        """
        if n > self.free_count:
            raise OutOfPagesError(f"{n} pages wanted, {self.free_count} of {self.capacity} free")
        pages = [self._free.pop() for _ in range(n)]
        for page in pages:
            self._owned[page] = 1
        self.peak_used = max(self.peak_used, self.used_count)
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Give pages back.

        Raises:
            CacheError: a page is foreign, named twice or not owned; none was freed.
        """
        pages = list(pages)
        for page in pages:
            if not NULL_PAGE < page < len(self._owned):
                raise CacheError(f"page {page} is not one of 1..{self.capacity}")
            if not self._owned[page]:
                raise CacheError(f"page {page} is not in use (double free?)")
        if len(set(pages)) != len(pages):
            raise CacheError(f"a page is named twice in {pages}")
        for page in pages:
            self._owned[page] = 0
        self._free.extend(reversed(pages))
