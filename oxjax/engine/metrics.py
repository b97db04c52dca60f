"""What an engine counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metrics:
    """A snapshot. Counters run from the making of the engine; the others are as of now.

    Attributes:
        requests: that were queued; `finished`, `failed` and `cancelled` are those that have left.
        steps: batches that ran.
        computed_tokens: rows of the model, those computed again after a preemption included.
        cached_tokens: tokens whose keys and values were found instead of computed.
        generated_tokens: tokens that were sampled.
        step_seconds: time spent in steps, device and host.
        running, waiting: requests now.
        preemptions: how often a running request gave its pages up.
        prefix_hits, prefix_misses: full pages of prompts that were found, and that were not.
        evictions: cached pages whose content made room for other.
        pages, pages_used, pages_cached, pages_peak: of the pool; used by requests now, kept for reuse now, and
            the most that were used at once.
        compilations: programs compiled.
    """

    requests: int
    finished: int
    failed: int
    cancelled: int
    steps: int
    computed_tokens: int
    cached_tokens: int
    generated_tokens: int
    step_seconds: float
    running: int
    waiting: int
    preemptions: int
    prefix_hits: int
    prefix_misses: int
    evictions: int
    pages: int
    pages_used: int
    pages_cached: int
    pages_peak: int
    compilations: int
