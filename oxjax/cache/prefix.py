"""State found again by the tokens that led to it: what one sequence computed, the next that begins alike need not.

The key of a page is a hash of its tokens and of the key of the page before it, so it names the whole prefix,
and the root of the chain names everything else that keys and values depend on. Keys are 256-bit BLAKE2b:
a collision takes some 2**128 hashes to find, so equal keys are equal prefixes and tokens are not compared.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

from oxjax.cache.blocks import BlockAllocator
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
    """Page hashes of one sequence, so that each page is hashed once. Held by its owner.

    The tokens of hashed pages must not change afterwards; `cut` forgets those that do.

    Attributes:
        root: the root of its keys.
        keys: keys of its leading full pages, as far as they were needed.
        n_stored: how many of its leading pages are registered.
    """

    root: bytes
    keys: list[bytes] = field(default_factory=list)
    n_stored: int = 0

    def cut(self, n_pages: int) -> None:
        """Forget all but the first pages."""
        del self.keys[n_pages:]
        self.n_stored = min(self.n_stored, n_pages)

    def copy(self) -> PrefixTrail:
        """The trail of a sequence that goes on from the same state."""
        return PrefixTrail(self.root, list(self.keys), self.n_stored)


class Found(NamedTuple):
    """The state of a cached prefix.

    Attributes:
        n_tokens: its length; a multiple of the page size.
        pages: with its keys and values; none without paged layers.
        slot: with the recurrent state after its last token; None without recurrent layers, or if nothing was found.
    """

    n_tokens: int
    pages: list[int]
    slot: int | None


class PrefixCache:
    """Finds the state of layers by the tokens that led to it, and makes computed state findable.

    Paged layers can go on from any full page, recurrent ones only from a checkpoint: a slot kept at a multiple
    of `checkpoint_every` tokens. A prefix counts as found where every layer has its state.

    Invariant: who holds a page through the cache also holds the pages that it continues, so what a live
    sequence shares or has stored is never evicted under it.

    Args:
        allocator: the page pool; None for models without paged layers.
        page_size: tokens of a page.
        root: what `root_key` gave; the default for sequences.
        slots: the slot pool; None for models without recurrent layers.
        checkpoint_every: tokens from one checkpoint to the next; a multiple of `page_size`.

    Attributes:
        lookups: calls of `match`.
        hits: pages of tokens that `match` found.
        misses: full pages of tokens within the limits given to `match` that it did not find.
        saved_tokens: tokens on the pages found.
    """

    def __init__(
        self,
        allocator: BlockAllocator | None,
        page_size: int,
        root: bytes,
        *,
        slots: BlockAllocator | None = None,
        checkpoint_every: int = 256,
    ):
        if page_size < 1:
            raise CacheError(f"a page of {page_size} tokens: at least 1")
        if slots is not None and (checkpoint_every < 1 or checkpoint_every % page_size):
            raise CacheError(
                f"checkpoints every {checkpoint_every} tokens: expected a multiple of the page, {page_size}"
            )
        self.allocator, self.slots, self.page_size, self.root = allocator, slots, page_size, root
        self.stride = page_size if slots is None else checkpoint_every
        self.lookups = self.hits = self.misses = self.saved_tokens = 0

    def trail(self, root: bytes | None = None) -> PrefixTrail:
        """The trail of a new sequence, under a root of its own where it has an adapter or a salt."""
        return PrefixTrail(self.root if root is None else root)

    def peek(self, tokens: Sequence[int], *, limit: int, trail: PrefixTrail) -> tuple[int, int]:
        """Number of tokens that `match` would find, without taking them, and number of live pages among theirs.

        A sequence of `n` pages can be admitted if `n` less the live ones are free.
        """
        found = self._find(tokens, limit, trail)
        return found.n_tokens, sum(self.allocator.ref_count(page) > 0 for page in found.pages)

    def match(self, tokens: Sequence[int], *, limit: int, trail: PrefixTrail) -> Found:
        """Acquire the state of the longest cached prefix; whoever gets it frees it.

        Args:
            tokens: token ids, from the beginning of the sequence.
            limit: tokens that may be covered at most; `len(tokens) - 1` leaves one to compute logits from.
            trail: the sequence's; it begins again at what is found.
        """
        found = self._find(tokens, limit, trail)
        n = found.n_tokens // self.page_size
        for key in trail.keys[: len(found.pages)]:
            self.allocator.acquire_cached(key)
        if found.slot is not None:
            self.slots.acquire_cached(trail.keys[n - 1])
        trail.n_stored = n
        self.lookups += 1
        self.hits += n
        self.misses += self._n_full(tokens, limit) - n
        self.saved_tokens += found.n_tokens
        return found

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
            key = self.key(tokens, i, trail)
            holder = self.allocator.register(pages[i], key, parent)
            if holder != pages[i]:
                self.allocator.acquire_cached(key)
                self.allocator.free([pages[i]])
                pages[i] = holder
            trail.n_stored = i + 1

    def store_checkpoint(self, tokens: Sequence[int], slot: int, position: int, trail: PrefixTrail) -> None:
        """Register a slot with the state after `position` tokens, if that is where checkpoints are kept.

        The slot must not be written any more. A slot that holds the same already stays the one that is found.
        """
        if position and position % self.stride == 0:
            self.slots.register(slot, self.key(tokens, position // self.page_size - 1, trail))

    def checkpoints(self, position: int, trail: PrefixTrail) -> dict[int, int]:
        """Checkpoints of a sequence that are still kept: the slot at each position, up to and with `position`."""
        every, found = self.stride // self.page_size, {}
        for n in range(every, min(position // self.page_size, len(trail.keys)) + 1, every):
            if (slot := self.slots.lookup(trail.keys[n - 1])) is not None:
                found[n * self.page_size] = slot
        return found

    def key(self, tokens: Sequence[int], i: int, trail: PrefixTrail) -> bytes:
        """Key of a sequence's page `i`, which must be full of its tokens."""
        for j in range(len(trail.keys), i + 1):
            chunk = tokens[j * self.page_size : (j + 1) * self.page_size]
            trail.keys.append(_page_key(chunk, trail.root, trail.keys[-1] if trail.keys else None))
        return trail.keys[i]

    def _n_full(self, tokens: Sequence[int], limit: int) -> int:
        return max(0, min(limit, len(tokens))) // self.page_size

    def _find(self, tokens: Sequence[int], limit: int, trail: PrefixTrail) -> Found:
        n_full, pages = self._n_full(tokens, limit), []
        if self.allocator is not None:
            for i in range(n_full):
                if (page := self.allocator.lookup(self.key(tokens, i, trail))) is None:
                    break
                pages.append(page)
            n_full = len(pages)
        if self.slots is None:
            return Found(n_full * self.page_size, pages, None)
        every = self.stride // self.page_size
        for n in range(n_full // every * every, 0, -every):
            if (slot := self.slots.lookup(self.key(tokens, n - 1, trail))) is not None:
                return Found(n * self.page_size, pages[:n], slot)
        return Found(0, [], None)
