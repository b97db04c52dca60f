"""The loop: schedule rows, run them, sample, hand tokens to their requests."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from oxjax.cache.blocks import PageAllocator
from oxjax.cache.prefix import PrefixCache, root_key
from oxjax.engine.metrics import Metrics
from oxjax.engine.output import Output
from oxjax.engine.runner import Runner
from oxjax.engine.scheduler import Saved, Scheduler, Sequence, Work
from oxjax.engine.snapshot import Entry, Host, decode, encode, model_fingerprint, row_specs
from oxjax.errors import NonFiniteLogitsError, RequestError
from oxjax.models.load import Model
from oxjax.sampling.params import SamplingParams


@dataclass(eq=False)
class Request:
    """A request in the engine.

    Attributes:
        sequence: its tokens and pages.
        params: how it is sampled; None for a prompt whose logits are wanted.
        seed: of its draws.
        output: what it has generated.
        logits: float32 rows `[n, vocab]` so far, for a prompt whose logits are wanted.
        error: why it failed.
        done: whether it has left the engine.
    """

    sequence: Sequence
    params: SamplingParams | None = None
    seed: int = 0
    output: Output | None = None
    logits: list[np.ndarray] = field(default_factory=list)
    error: RequestError | None = None
    done: bool = False


class Engine:
    """Continuous batching over one model.

    Args:
        model: loaded.
        n_pages: pages of the pool, the null page included.
        page_size: tokens of a page; a divisor of the attention block.
        max_batch: sequences that run at once.
        max_rows: rows of a step.
        max_context: tokens that a sequence may reach.
        reuse_prefixes: find keys and values of prompts that begin as others did instead of computing them.
        swap: keep the rows of a preempted request on the host instead of computing them again.
    """

    def __init__(
        self,
        model: Model,
        *,
        n_pages: int,
        page_size: int,
        max_batch: int,
        max_rows: int,
        max_context: int,
        reuse_prefixes: bool = True,
        swap: bool = True,
    ):
        self.tokenizer = model.tokenizer
        allocator = PageAllocator(n_pages)
        root = root_key(model=repr(model.config))  # the cache lives no longer than these parameters do
        self.scheduler = Scheduler(
            allocator,
            prefix=PrefixCache(allocator, page_size, root) if reuse_prefixes else None,
            export=self._saved if swap else None,
            page_size=page_size,
            max_batch=max_batch,
            max_rows=max_rows,
            max_context=max_context,
        )
        self.runner = Runner(
            model.config,
            model.params,
            n_pages=n_pages,
            page_size=page_size,
            max_batch=max_batch,
            max_rows=max_rows,
            max_context=max_context,
        )
        self._requests: dict[Sequence, Request] = {}
        self._counts: Counter[str] = Counter()

    def metrics(self) -> Metrics:
        """What the engine has done since it was made, and how full it is now."""
        scheduler, allocator, prefix = self.scheduler, self.scheduler.allocator, self.scheduler.prefix
        return Metrics(
            **{name: self._counts[name] for name in ("requests", "finished", "failed", "cancelled", "steps")},
            computed_tokens=self._counts["rows"],
            cached_tokens=prefix.saved_tokens if prefix else 0,
            generated_tokens=self._counts["generated"],
            step_seconds=self._counts["nanoseconds"] / 1e9,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            preemptions=scheduler.preemptions,
            prefix_hits=prefix.hits if prefix else 0,
            prefix_misses=prefix.misses if prefix else 0,
            evictions=allocator.evictions,
            pages=allocator.capacity,
            pages_used=allocator.used_count,
            pages_cached=allocator.cached_count,
            pages_peak=allocator.peak_used,
            compilations=self.runner.compilations.total(),
        )

    def generate(self, prompt: list[int], params: SamplingParams, seed: int) -> Request:
        """Queue a prompt to be continued.

        Raises:
            RequestTooLargeError: it can never fit; nothing is queued.
        """
        room = self.scheduler.max_context - len(prompt)
        max_new = max(1, room) if params.max_tokens is None else params.max_tokens
        sequence = Sequence(tokens=list(prompt), max_length=len(prompt) + max_new)
        output = Output(self.tokenizer, prompt, params, max_new)
        return self._add(Request(sequence=sequence, params=params, seed=seed, output=output))

    def logits(self, prompt: list[int]) -> Request:
        """Queue a prompt whose logits are wanted at every position; errors as for `generate`."""
        return self._add(Request(Sequence(tokens=list(prompt), max_length=len(prompt), all_logits=True)))

    def _add(self, request: Request) -> Request:
        self.scheduler.add(request.sequence)
        self._requests[request.sequence] = request
        self._counts["requests"] += 1
        return request

    def snapshot(self) -> bytes:
        """Everything about the requests in the engine, so that `resume` can go on in another process.

        The engine goes on as if nothing had happened. A snapshot takes about as many bytes as the keys and values
        of its requests, and some four times that in memory while it is made. The first one reads all parameters.
        """
        sequences = (*self.scheduler.running, *self.scheduler.waiting)
        requests = [self._requests[s] for s in sequences]
        entries = [Entry(r.sequence, r.params, r.seed, r.output, r.logits) for r in requests]
        return encode(self._host, entries, [self._saved(s) for s in sequences])

    def resume(self, blob: bytes) -> list[Request]:
        """Queue the requests of a snapshot, behind those that are here, to go on where they were.

        The engine may have other pages, batch sizes and limits than the one that made the snapshot, and requests of
        its own. Computed keys and values wait on the host until pages are free. In exact mode the requests give the
        same bits as they would have given there.

        Returns:
            The requests in their order there; those that were done are not among them.

        Raises:
            SnapshotMismatchError: another model, dtype or exactness.
            SnapshotError: damaged, of another version, or a request does not fit. Nothing was queued.
        """
        requests = [Request(*entry) for entry in decode(self._host, blob, self.scheduler.check)]
        return [self._add(request) for request in requests]

    @cached_property
    def _host(self) -> Host:
        """What a snapshot depends on; reads all parameters once."""
        config, state = self.runner.config, self.runner.state
        return Host(model_fingerprint(config, self.runner.params), config.vocab_size, self.tokenizer, row_specs(state))

    def _saved(self, sequence: Sequence) -> Saved:
        if sequence.saved is not None:
            return sequence.saved
        return Saved(sequence.n_computed, self.runner.export_rows(sequence.pages, sequence.n_computed))

    def _restore(self, sequence: Sequence) -> None:
        """Write the saved rows of a sequence that was just admitted, behind those that the prefix cache had."""
        n_found, page_size = sequence.trail.n_stored if sequence.trail else 0, self.scheduler.page_size
        n_tokens, rows = sequence.saved
        pages = sequence.pages[n_found : self.scheduler.pages_for(n_tokens)]
        if pages:
            self.runner.import_rows(pages, [array[n_found * page_size :] for array in rows])
        sequence.saved = None

    def cancel(self, request: Request) -> None:
        """Drop a request, whatever its state; its pages are free at once. Nothing happens to one that is done."""
        if not request.done:
            self._leave(request, "cancelled")

    def _leave(self, request: Request, how: str) -> None:
        self.scheduler.remove(request.sequence)
        del self._requests[request.sequence]
        request.done = True
        self._counts[how] += 1

    def step(self) -> None:
        """Run one batch and hand out what it gave. Does nothing when no request is in the engine.

        If the step itself fails, no request has advanced.
        """
        work = self.scheduler.schedule()
        if not work:
            return
        start = time.perf_counter_ns()
        for item in work:
            if item.sequence.saved is not None:
                self._restore(item.sequence)
        logits = self.runner.run(work)
        ends = np.cumsum([w.n_rows for w in work])
        wants_all = any(w.sequence.all_logits for w in work)
        rows = ends - 1 if wants_all else np.arange(len(work))
        choosing = {int(row): self._requests[w.sequence] for row, w in zip(rows, work, strict=True) if _chooses(w)}
        sampled = self._sample(logits, choosing) if choosing else {}
        scored = np.asarray(logits) if wants_all else None
        # The device has done its part: only now has anything advanced.
        self.scheduler.commit(work)
        if scored is not None:
            self._collect_logits(work, scored, ends)
        for row, request in choosing.items():
            self._deliver(request, {name: column[row] for name, column in sampled.items()})
        self._counts.update(steps=1, rows=sum(w.n_rows for w in work), nanoseconds=time.perf_counter_ns() - start)

    def _collect_logits(self, work: list[Work], logits: np.ndarray, ends: np.ndarray) -> None:
        for item, end in zip(work, ends, strict=True):
            if item.sequence.all_logits:
                request = self._requests[item.sequence]
                known = sum(map(len, request.logits))  # rows that came before a preemption
                request.logits.append(logits[end - item.n_rows : end][max(0, known - item.start) :].copy())
                if item.reaches_end:
                    self._leave(request, "finished")

    def _sample(self, logits: object, choosing: dict[int, Request]) -> dict[str, np.ndarray]:
        """Choose a token for each given row of the logits; the columns of `Sampled`, on the host."""
        table = [None] * (max(choosing) + 1)
        for row, request in choosing.items():
            table[row] = (request.params, request.seed, len(request.sequence.tokens))
        sampled = self.runner.sample(logits, table, max(r.params.logprobs for r in choosing.values()))
        return {name: np.asarray(getattr(sampled, name)) for name in sampled.__dataclass_fields__}

    def _deliver(self, request: Request, row: dict[str, Any]) -> None:
        """Append what was chosen for a request, or fail it."""
        tokens, n_top = request.sequence.tokens, request.params.logprobs
        if not row["finite"]:
            request.error = NonFiniteLogitsError(f"the logits for position {len(tokens)} hold NaN or infinity")
            self._leave(request, "failed")
            return
        token, logprob = int(row["tokens"]), float(row["logprobs"])
        top = zip(row["top_tokens"][:n_top].tolist(), row["top_logprobs"][:n_top].tolist(), strict=True)
        pairs = ((token, logprob), *(pair for pair in top if pair[0] != token)) if n_top else ()
        tokens.append(token)
        self._counts["generated"] += 1
        if request.output.push(token, logprob, pairs).finish_reason is not None:
            self._leave(request, "finished")


def _chooses(work: Work) -> bool:
    return work.reaches_end and not work.sequence.all_logits
