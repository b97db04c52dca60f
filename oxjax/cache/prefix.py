"""Prefix cache: finds computed state by a chain of hashes over token pages, as vLLM's block hashes.

The hash of a page covers its tokens and the hash of the page before it, so it names the whole prefix, and the root of
the chain names everything else that keys and values depend on. Hashes are 256-bit BLAKE2b: a collision takes some
2**128 attempts to find, so equal hashes are taken for equal prefixes and tokens are not compared.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

from oxjax.cache.allocator import PageAllocator
from oxjax.errors import CacheError

HASH_BYTES = 32


def root_key(*, model: str, adapter: str = "", salt: str = "") -> bytes:
    """The root of a chain of hashes: prefixes are shared only under equal roots.

    Args:
        model: everything that keys and values depend on besides tokens: weights, numerics, type of the cache, RoPE.
        adapter: likewise for what is added to the weights, its scale included.
        salt: anything that should keep users apart, such as the name of a tenant.
    """
    digest = blake2b(digest_size=HASH_BYTES, person=b"oxjax root")
    for text in (model, adapter, salt):
        data = text.encode()
        digest.update(struct.pack("<Q", len(data)) + data)  # lengths make the boundaries part of the message
    return digest.digest()


def hash_page(tokens: Sequence[int], root: bytes, parent: bytes | None) -> bytes:
    """Hash of a page and everything before it.

    Args:
        tokens: of the page.
        root: of the chain.
        parent: hash of the page before it; None for the first page.
    """
    data = struct.pack(f"<{len(tokens)}q", *tokens)
    if parent is None:  # its own domain: no root can pass for the hash of a page
        before = struct.pack("<Q", len(root)) + root
        return blake2b(before + data, digest_size=HASH_BYTES, person=b"oxjax first page").digest()
    return blake2b(parent + data, digest_size=HASH_BYTES, person=b"oxjax next page").digest()


@dataclass(eq=False)
class BlockHashes:
    """Hashes of the full pages of one sequence, held by the sequence so that each page is hashed once.

    The tokens of hashed pages must not change afterwards; `cut` drops the hashes of those that do.

    Attributes:
        root: of the chain. The default belongs to no cache.
        page_size: tokens of a page.
        hashes: of leading full pages, as far as they were needed.
        n_stored: number of leading pages that are registered in the cache.
    """

    root: bytes = b""
    page_size: int = 1
    hashes: list[bytes] = field(default_factory=list)
    n_stored: int = 0

    def at(self, tokens: Sequence[int], i: int) -> bytes:
        """Hash of page `i`, which must be full of the sequence's tokens."""
        for j in range(len(self.hashes), i + 1):
            page = tokens[j * self.page_size : (j + 1) * self.page_size]
            self.hashes.append(hash_page(page, self.root, self.hashes[-1] if self.hashes else None))
        return self.hashes[i]

    def cut(self, n_pages: int) -> None:
        """Drop all but the first `n_pages` hashes."""
        del self.hashes[n_pages:]
        self.n_stored = min(self.n_stored, n_pages)

    def copy(self) -> BlockHashes:
        """Hashes for a sequence that continues from the same state."""
        return BlockHashes(self.root, self.page_size, list(self.hashes), self.n_stored)


class CachedPrefix(NamedTuple):
    """The state of a cached prefix.

    Attributes:
        n_tokens: its length; a multiple of the page size.
        pages: with its keys and values; none without paged layers.
        slot: with the recurrent state after its last token; None without recurrent layers, or if nothing was found.
    """

    n_tokens: int
    pages: list[int]
    slot: int | None


class NoPrefix:
    """Prefix cache that stores and finds nothing: every sequence is computed from its first token."""

    hits = misses = saved_tokens = 0

    def block_hashes(self) -> BlockHashes:
        """Hashes for a new sequence; nothing computes any."""
        return BlockHashes()

    def peek(self, tokens: Sequence[int], *, limit: int, block_hashes: BlockHashes) -> tuple[int, int]:
        """Find nothing."""
        return 0, 0

    def match(self, tokens: Sequence[int], *, limit: int, block_hashes: BlockHashes) -> CachedPrefix:
        """Find nothing."""
        return CachedPrefix(0, [], None)

    def next_missing(self, tokens: Sequence[int], *, limit: int, block_hashes: BlockHashes) -> tuple[int, bytes] | None:
        """Nothing is worth waiting for."""
        return None

    def store(self, tokens: Sequence[int], pages: list[int], n_computed: int, block_hashes: BlockHashes) -> None:
        """Store nothing."""

    def store_checkpoint(self, tokens: Sequence[int], slot: int, position: int, block_hashes: BlockHashes) -> None:
        """Store nothing."""

    def checkpoints(self, position: int, block_hashes: BlockHashes) -> dict[int, int]:
        """No checkpoints."""
        return {}

    def rows_to_checkpoint(self, position: int, n: int) -> int:
        """All `n` rows: no checkpoint is kept."""
        return n


class PrefixCache:
    """Prefix cache: finds the state of layers by the tokens that led to it, and registers computed state.

    Paged layers can continue from any full page, recurrent ones only from a checkpoint: a slot kept at a multiple of
    `checkpoint_every` tokens. A prefix counts as found where every layer has its state.

    Invariant: an owner that holds a page through the cache also holds the pages that it continues, so what a live
    sequence shares or has stored is never evicted under it.

    Args:
        allocator: the page pool; None for models without paged layers.
        page_size: tokens of a page.
        root: from `root_key`; the default for sequences.
        slots: the slot pool; None for models without recurrent layers.
        checkpoint_every: tokens from one checkpoint to the next; a multiple of `page_size`.

    Attributes:
        hits: number of pages that `match` found.
        misses: number of full pages within the limits given to `match` that it did not find.
        saved_tokens: number of tokens on the pages found.
    """

    def __init__(
        self,
        allocator: PageAllocator | None,
        page_size: int,
        root: bytes,
        *,
        slots: PageAllocator | None = None,
        checkpoint_every: int = 256,
    ):
        if page_size < 1:
            raise CacheError(f"a page of {page_size} tokens: at least 1")
        if slots is not None and (checkpoint_every < 1 or checkpoint_every % page_size):
            raise CacheError(
                f"checkpoints every {checkpoint_every} tokens: expected a multiple of the page, {page_size}"
            )
        self.allocator = PageAllocator.empty() if allocator is None else allocator
        self.slots = PageAllocator.empty("slot") if slots is None else slots
        self.page_size = page_size
        self.root = root
        self.stride = checkpoint_every if self.slots.capacity else page_size
        self.hits = self.misses = self.saved_tokens = 0

    def block_hashes(self, root: bytes | None = None) -> BlockHashes:
        """Hashes for a new sequence, under a root of its own where it has an adapter or a salt."""
        return BlockHashes(self.root if root is None else root, self.page_size)

    def peek(self, tokens: Sequence[int], *, limit: int, block_hashes: BlockHashes) -> tuple[int, int]:
        """Number of tokens that `match` would find, and number of live pages among theirs; takes and counts nothing.

        A sequence of `n` pages can be admitted if `n` minus the live ones can be allocated.
        """
        found = self._find(tokens, limit, block_hashes)
        return found.n_tokens, sum(self.allocator.ref_count(page) > 0 for page in found.pages)

    def match(self, tokens: Sequence[int], *, limit: int, block_hashes: BlockHashes) -> CachedPrefix:
        """Acquire the state of the longest cached prefix; the caller frees it.

        Args:
            tokens: token ids, from the beginning of the sequence.
            limit: largest number of tokens that may be found; `len(tokens) - 1` leaves one to compute logits from.
            block_hashes: of the sequence; `n_stored` is set to the pages found.
        """
        found = self._find(tokens, limit, block_hashes)
        n = found.n_tokens // self.page_size
        for key in block_hashes.hashes[: len(found.pages)]:
            self.allocator.acquire_cached(key)
        if found.slot is not None:
            self.slots.acquire_cached(block_hashes.hashes[n - 1])
        block_hashes.n_stored = n
        self.hits += n
        self.misses += self._n_full(tokens, limit) - n
        self.saved_tokens += found.n_tokens
        return found

    def next_missing(self, tokens: Sequence[int], *, limit: int, block_hashes: BlockHashes) -> tuple[int, bytes] | None:
        """Number of tokens up to the next state that could be found and is not cached, and its hash.

        States that can be found end with a page, or for models with recurrent layers at a checkpoint. None if the next
        one lies beyond `limit`.
        """
        end = (self._find(tokens, limit, block_hashes).n_tokens // self.stride + 1) * self.stride
        return None if end > limit else (end, block_hashes.at(tokens, end // self.page_size - 1))

    def store(self, tokens: Sequence[int], pages: list[int], n_computed: int, block_hashes: BlockHashes) -> None:
        """Register the pages that are full of computed tokens; call it once their keys and values are written.

        Where another page already holds the same content, that one replaces the sequence's own in `pages`, which is
        freed. Nothing more is stored once a page of the sequence was forgotten.

        Args:
            tokens: token ids, from the beginning of the sequence.
            pages: its pages in order of position; entries are replaced in place.
            n_computed: number of leading tokens whose keys and values are in the pages.
            block_hashes: of the sequence.

        Raises:
            CacheError: fewer tokens are computed than were stored before, or more than there are.
        """
        n_full = n_computed // self.page_size
        if not block_hashes.n_stored <= n_full <= len(pages) or n_computed > len(tokens):
            raise CacheError(
                f"{n_computed} computed of {len(tokens)} tokens on {len(pages)} pages of {self.page_size}, with "
                f"{block_hashes.n_stored} pages stored before: only computed tokens are stored, never fewer than before"
            )
        for i in range(block_hashes.n_stored, n_full):
            parent = pages[i - 1] if i else None
            if i and self.allocator.lookup(block_hashes.hashes[i - 1]) != parent:
                return
            key = block_hashes.at(tokens, i)
            holder = self.allocator.register(pages[i], key, parent)
            if holder != pages[i]:
                self.allocator.acquire_cached(key)
                self.allocator.free([pages[i]])
                pages[i] = holder
            block_hashes.n_stored = i + 1

    def store_checkpoint(self, tokens: Sequence[int], slot: int, position: int, block_hashes: BlockHashes) -> None:
        """Register a slot with the state after `position` tokens, if that is where checkpoints are kept.

        The slot must not be written any more. If another slot already holds the same state, that one stays registered.
        """
        if position and position % self.stride == 0:
            self.slots.register(slot, block_hashes.at(tokens, position // self.page_size - 1))

    def checkpoints(self, position: int, block_hashes: BlockHashes) -> dict[int, int]:
        """Checkpoints of a sequence that are still kept: the slot at each position, up to and with `position`."""
        every, found = self.stride // self.page_size, {}
        for n in range(every, min(position // self.page_size, len(block_hashes.hashes)) + 1, every):
            if (slot := self.slots.lookup(block_hashes.hashes[n - 1])) is not None:
                found[n * self.page_size] = slot
        return found

    def rows_to_checkpoint(self, position: int, n: int) -> int:
        """Number of the next `n` rows that end at the next checkpoint at the latest."""
        return min(n, self.stride - position % self.stride) if self.slots.capacity else n

    def _n_full(self, tokens: Sequence[int], limit: int) -> int:
        return max(0, min(limit, len(tokens))) // self.page_size

    def _find(self, tokens: Sequence[int], limit: int, block_hashes: BlockHashes) -> CachedPrefix:
        n_full, pages = self._n_full(tokens, limit), []
        if self.allocator.capacity:
            for i in range(n_full):
                if (page := self.allocator.lookup(block_hashes.at(tokens, i))) is None:
                    break
                pages.append(page)
            n_full = len(pages)
        if not self.slots.capacity:
            return CachedPrefix(n_full * self.page_size, pages, None)
        every = self.stride // self.page_size
        for n in range(n_full // every * every, 0, -every):
            if (slot := self.slots.lookup(block_hashes.at(tokens, n - 1))) is not None:
                return CachedPrefix(n * self.page_size, pages[:n], slot)
        return CachedPrefix(0, [], None)
