"""Counters of an engine."""

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
        host_seconds: the host's part of it: scheduling and bookkeeping, while the device has nothing to do.
        running, waiting: requests now.
        preemptions: how often a running request gave its state up.
        reuses_prefixes: whether what prompts have in common is looked for at all.
        prefix_hits, prefix_misses: full pages of prompts that were found, and that were not.
        evictions: cached pages whose content made room for other.
        pages, pages_used, pages_cached, pages_peak: of the pool; used by requests now, kept for reuse now, and
            the most that were used at once.
        page_bytes: size of a page over all layers.
        slots, slots_used: of the pool of recurrent states; zero for models without recurrent layers.
        checkpoints: recurrent states kept for reuse now; `checkpoint_evictions` made room for others.
        slot_bytes: size of a sequence's recurrent state over all layers.
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
    host_seconds: float
    running: int
    waiting: int
    preemptions: int
    reuses_prefixes: bool
    prefix_hits: int
    prefix_misses: int
    evictions: int
    pages: int
    pages_used: int
    pages_cached: int
    pages_peak: int
    page_bytes: int
    slots: int
    slots_used: int
    checkpoints: int
    checkpoint_evictions: int
    slot_bytes: int
    compilations: int

    def line(self, before: Metrics) -> str:
        """One line about what goes on, with the speed since an earlier snapshot."""
        seconds = self.step_seconds - before.step_seconds
        made, read = (getattr(self, n) - getattr(before, n) for n in ("generated_tokens", "computed_tokens"))
        speed = f"{made / seconds:.1f} tokens/s" if made and seconds else f"{read / (seconds or 1):.0f} prompt tokens/s"
        parts = [
            speed if seconds else "starting",
            f"{self.finished} done, {self.running} running, {self.waiting} waiting",
        ]
        if self.pages:
            parts.append(f"pages {self.pages_used}/{self.pages} used, {self.pages_cached} cached")
        if self.slots:
            parts.append(f"states {self.slots_used}/{self.slots} used, {self.checkpoints} kept")
        parts.append(f"{self.cached_tokens} prompt tokens found" if self.reuses_prefixes else "prefixes not reused")
        if self.preemptions:
            parts.append(f"{self.preemptions} preemptions")
        return " · ".join(parts)
