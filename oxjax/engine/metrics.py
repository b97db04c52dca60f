"""Counters of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oxjax.engine.active import ActiveRequests
    from oxjax.engine.runner import Runner
    from oxjax.engine.scheduler import Scheduler


@dataclass(frozen=True)
class Metrics:
    """Counters since the engine was made, and the state of its pool now.

    Attributes:
        requests: number of queued requests; `finished`, `failed` and `cancelled` count those that have left.
        steps: batches that ran.
        computed_tokens: rows of the model, those computed again after a preemption included.
        cached_tokens: tokens whose keys and values were found instead of computed.
        generated_tokens: tokens that were sampled.
        step_seconds: time spent in steps, device and host.
        host_seconds: the part of it in which the device waits for the host: scheduling and bookkeeping.
        running, waiting: requests now.
        preemptions: number of times that a running request gave up its state.
        reuses_prefixes: common prefixes of prompts are looked for.
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
        """One line of status, with the speed since earlier metrics."""
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


def metrics_of(runner: Runner, scheduler: Scheduler, active: ActiveRequests) -> Metrics:
    """The metrics of an engine with these parts."""
    counts, pool = active.counts, scheduler.pool
    pages, slots, prefix = pool.pages, pool.slots, pool.prefix
    return Metrics(
        **{name: counts[name] for name in ("requests", "finished", "failed", "cancelled")},
        steps=scheduler.steps,
        computed_tokens=counts["rows"],
        cached_tokens=prefix.saved_tokens,
        generated_tokens=counts["generated"],
        step_seconds=counts["nanoseconds"] / 1e9,
        host_seconds=counts["host nanoseconds"] / 1e9,
        running=len(scheduler.running),
        waiting=scheduler.n_waiting,
        preemptions=scheduler.preemptions,
        reuses_prefixes=pool.reuses_prefixes,
        prefix_hits=prefix.hits,
        prefix_misses=prefix.misses,
        evictions=pages.evictions,
        pages=pages.capacity,
        pages_used=pages.used_count,
        pages_cached=pages.cached_count,
        pages_peak=pages.peak_used,
        page_bytes=runner.config.page_bytes(pool.page_size),
        slots=slots.capacity,
        slots_used=slots.used_count,
        checkpoints=slots.cached_count,
        checkpoint_evictions=slots.evictions,
        slot_bytes=runner.config.slot_bytes,
        compilations=runner.compilations.total(),
    )
