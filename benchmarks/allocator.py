"""Speed of the page allocator by pool size: constant per operation if the ratio stays near 1 (caches aside).

python benchmarks/allocator.py [--operations 1000000]

Chains of pages are allocated, registered, shared, freed in any order and evicted, at random, on a pool kept full.
"""

import argparse
import random
import time

from oxjax.cache.allocator import PageAllocator
from oxjax.cache.prefix import BlockHashes, root_key

CHAIN = 8  # pages that continue each other


def run(n_pages: int, operations: int) -> tuple[float, float]:
    """Operations per second on one page each, and evictions per allocation, once the pool is full."""
    rng, pool = random.Random(0), PageAllocator(n_pages + 1)
    keys = [rng.randbytes(32) for _ in range(n_pages + 1)]  # of what each page held last
    live: list[int] = []  # one entry per reference
    chain: list[int] = []

    def allocate() -> None:
        (page,) = pool.allocate(1)
        keys[page] = rng.randbytes(32)
        parent = pool.lookup(keys[chain[-1]]) if chain else None
        pool.register(page, keys[page], None if parent == page else parent)
        live.append(page)
        chain.append(page)
        if len(chain) == CHAIN:
            chain.clear()

    def share() -> None:
        page = pool.acquire_cached(keys[rng.randrange(1, n_pages + 1)])
        if page is not None:
            live.append(page)

    def release() -> None:
        j = rng.randrange(len(live))
        live[j], live[-1] = live[-1], live[j]
        pool.free([live.pop()])

    def play(rounds: int) -> None:
        for _ in range(rounds):
            allocate()
            share()
            while len(live) > n_pages // 2:
                release()

    play(4 * n_pages)
    evictions, begin = pool.evictions, time.process_time()
    play(rounds := operations // 5)  # allocate, register, share, release twice
    return operations / (time.process_time() - begin), (pool.evictions - evictions) / rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--pages", default="1000,10000,100000", help="sizes of the pool")
    args = parser.parse_args()
    operations, sizes = args.operations, [int(n) for n in args.pages.split(",")]
    speeds = []
    for n_pages in sizes:
        speed, evicted = run(n_pages, operations)
        speeds.append(speed)
        print(f"{n_pages:>7} pages: {speed / 1e6:.2f} M operations/s ({evicted:.0%} of the allocations evict)")
    print(f"time of an operation, {sizes[-1]} to {sizes[0]} pages: {speeds[0] / speeds[-1]:.2f}")
    tokens, root = list(range(200 * 16)), root_key(model="benchmark")
    begin = time.process_time()
    for _ in range(100):
        BlockHashes(root, 16).at(tokens, 199)
    print(f"hashes of 200 pages of 16 tokens: {(time.process_time() - begin) * 1e4:.0f} us")


if __name__ == "__main__":
    main()
