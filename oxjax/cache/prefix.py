"""Pages found again by their content: what one sequence computed, the next that begins alike need not.

The key of a page is a hash of its tokens and of the key of the page before it, so it names the whole prefix,
and the root of the chain names everything else that keys and values depend on. Keys are 256-bit BLAKE2b:
a collision takes some 2**128 hashes to find, so equal keys are equal prefixes and tokens are not compared.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from oxjax.cache.blocks import PageAllocator
from oxjax.errors import CacheError

KEY_BYTES = 32


def root_key(*, model: str, adapter: str = "", salt: str = "") -> bytes:
    """The root of a chain of page keys: prefixes are shared only under equal roots.

    Args:
        model: all that keys and values depend on besides tokens: weights, their numerics, type of the cache, rope.
        adapter: likewise for what is added to the weights, its scale included.
        salt: anything that shall keep users apart, such as the name of a tenant.
    """
    digest = blake2b(digest_size=KEY_BYTES, person=b"oxjax root")
    for text in (model, adapter, salt):
        data = text.encode()
        digest.update(struct.pack("<Q", len(data)) + data)  # lengths make the boundaries part of the message
    return digest.digest()


def page_keys(
    tokens: Sequence[int], page_size: int, root: bytes, start: int = 0, parent_key: bytes | None = None
) -> list[bytes]:
    """One key per full page of `tokens[start:]`; a trailing partial page has none.

    Args:
        tokens: token ids, from the beginning of the sequence.
        page_size: tokens of a page.
        root: what `root_key` gave.
        start: where the first page to be hashed begins; a multiple of `page_size`.
        parent_key: key of the page before `start`; None where `start` is 0.

    Raises:
        CacheError: `start` is no boundary between pages, or does not go with `parent_key`.
    """
    if start % page_size or start < 0 or (start == 0) != (parent_key is None):
        given = "no key" if parent_key is None else "a key"
        raise CacheError(f"start {start} with {given} before it: a multiple of {page_size}, with one unless it is 0")
    keys = []
    for i in range(start, len(tokens) - page_size + 1, page_size):
        parent_key = _page_key(tokens[i : i + page_size], root, parent_key)
        keys.append(parent_key)
    return keys


def _page_key(tokens: Sequence[int], root: bytes, parent_key: bytes | None) -> bytes:
    data = struct.pack(f"<{len(tokens)}q", *tokens)
    if parent_key is None:  # its own domain: no root can pass for the key of a page
        before = struct.pack("<Q", len(root)) + root
        return blake2b(before + data, digest_size=KEY_BYTES, person=b"oxjax first page").digest()
    return blake2b(parent_key + data, digest_size=KEY_BYTES, person=b"oxjax next page").digest()


@dataclass(eq=False)
class PrefixTrail:
    """What the cache knows about one sequence, so that each of its pages is hashed once. Held by its owner.

    The tokens of hashed pages must not change afterwards: a sequence that is rewound below
    `len(keys) * page_size` tokens needs a new trail.

    Attributes:
        root: the root of its keys.
        keys: keys of its leading full pages, as far as they were needed.
        n_stored: how many of its leading pages are registered.
    """

    root: bytes
    keys: list[bytes] = field(default_factory=list)
    n_stored: int = 0


class PrefixCache:
    """Finds pages by the tokens they hold, and makes computed ones findable.

    Invariant: who holds a page through the cache also holds the pages that it continues, so what a live
    sequence shares or has stored is never evicted under it.

    Args:
        allocator: the page pool.
        page_size: tokens of a page.
        root: what `root_key` gave; the default for sequences.

    Attributes:
        lookups: calls of `match`.
        hits: pages that `match` found.
        misses: full pages within the limits given to `match` that it did not find.
        saved_tokens: tokens on the pages found.
    """

    def __init__(self, allocator: PageAllocator, page_size: int, root: bytes):
        if page_size < 1:
            raise CacheError(f"a page of {page_size} tokens: at least 1")
        self.allocator, self.page_size, self.root = allocator, page_size, root
        self.lookups = self.hits = self.misses = self.saved_tokens = 0

    def trail(self, root: bytes | None = None) -> PrefixTrail:
        """The trail of a new sequence, under a root of its own where it has an adapter or a salt."""
        return PrefixTrail(self.root if root is None else root)

    def peek(self, tokens: Sequence[int], *, limit: int, trail: PrefixTrail) -> tuple[int, int]:
        """What `match` would find, without taking or counting it: the pages, and how many of them are live.

        A sequence of `n` pages can be admitted if `n` less the live ones are free.
        """
        pages = self._cached_run(tokens, limit, trail)
        return len(pages), sum(self.allocator.ref_count(page) > 0 for page in pages)

    def match(self, tokens: Sequence[int], *, limit: int, trail: PrefixTrail) -> list[int]:
        """Acquire the pages of the longest cached prefix, in order; whoever gets them frees them.

        Args:
            tokens: token ids, from the beginning of the sequence.
            limit: tokens that may be covered at most; `len(tokens) - 1` leaves one to compute logits from.
            trail: the sequence's; it begins again at the pages found.
        """
        pages = self._cached_run(tokens, limit, trail)
        for key in trail.keys[: len(pages)]:
            self.allocator.acquire_cached(key)
        trail.n_stored = len(pages)
        self.lookups += 1
        self.hits += len(pages)
        self.misses += self._n_full(tokens, limit) - len(pages)
        self.saved_tokens += len(pages) * self.page_size
        return pages

    def store(self, tokens: Sequence[int], pages: list[int], n_computed: int, trail: PrefixTrail) -> None:
        """Register the pages that are full of computed tokens; call it once their keys and values are written.

        Where another page already holds the same content, that one takes the place in `pages` and the
        sequence's own is given back. Nothing more is stored once a page of the sequence was forgotten.

        Args:
            tokens: token ids, from the beginning of the sequence.
            pages: its pages in order of position; entries are exchanged in place.
            n_computed: leading tokens whose keys and values are in the pages.
            trail: the sequence's.

        Raises:
            CacheError: fewer tokens are computed than were stored before, or more than there are.
        """
        n_full = n_computed // self.page_size
        if not trail.n_stored <= n_full <= len(pages) or n_computed > len(tokens):
            raise CacheError(
                f"{n_computed} computed of {len(tokens)} tokens on {len(pages)} pages of {self.page_size}, with "
                f"{trail.n_stored} pages stored before: only computed tokens are stored, and they never get fewer"
            )
        for i in range(trail.n_stored, n_full):
            parent = pages[i - 1] if i else None
            if i and self.allocator.lookup(trail.keys[i - 1]) != parent:
                return
            key = self._key(tokens, i, trail)
            holder = self.allocator.register(pages[i], key, parent)
            if holder != pages[i]:
                self.allocator.acquire_cached(key)
                self.allocator.free([pages[i]])
                pages[i] = holder
            trail.n_stored = i + 1

    def _n_full(self, tokens: Sequence[int], limit: int) -> int:
        return max(0, min(limit, len(tokens))) // self.page_size

    def _cached_run(self, tokens: Sequence[int], limit: int, trail: PrefixTrail) -> list[int]:
        pages: list[int] = []
        for i in range(self._n_full(tokens, limit)):
            if (page := self.allocator.lookup(self._key(tokens, i, trail))) is None:
                break
            pages.append(page)
        return pages

    def _key(self, tokens: Sequence[int], i: int, trail: PrefixTrail) -> bytes:
        """Key of page `i`; all before it are on the trail."""
        if i == len(trail.keys):
            chunk = tokens[i * self.page_size : (i + 1) * self.page_size]
            trail.keys.append(_page_key(chunk, trail.root, trail.keys[-1] if trail.keys else None))
        return trail.keys[i]
