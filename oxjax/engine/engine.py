"""The loop: schedule rows, run them, sample, hand tokens to their requests."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from oxjax.cache.blocks import PageAllocator
from oxjax.cache.prefix import PrefixCache, root_key
from oxjax.engine.metrics import Metrics
from oxjax.engine.output import Output
from oxjax.engine.runner import Runner
from oxjax.engine.scheduler import Scheduler, Sequence, Work
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
    ):
        self.tokenizer = model.tokenizer
        allocator = PageAllocator(n_pages)
        root = root_key(model=repr(model.config))  # the cache lives no longer than these parameters do
        self.scheduler = Scheduler(
            allocator,
            prefix=PrefixCache(allocator, page_size, root) if reuse_prefixes else None,
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
        logits = self.runner.run(work)
        self.scheduler.commit(work)
        ends = np.cumsum([w.n_rows for w in work])
        wants_all = any(w.sequence.all_logits for w in work)
        rows = ends - 1 if wants_all else np.arange(len(work))
        if wants_all:
            self._collect_logits(work, np.asarray(logits), ends)
        choosing = {int(row): self._requests[w.sequence] for row, w in zip(rows, work, strict=True) if _chooses(w)}
        if choosing:
            self._choose(logits, choosing)
        self._counts.update(steps=1, rows=sum(w.n_rows for w in work), nanoseconds=time.perf_counter_ns() - start)

    def _collect_logits(self, work: list[Work], logits: np.ndarray, ends: np.ndarray) -> None:
        for item, end in zip(work, ends, strict=True):
            if item.sequence.all_logits:
                request = self._requests[item.sequence]
                known = sum(map(len, request.logits))  # rows that came before a preemption
                request.logits.append(logits[end - item.n_rows : end][max(0, known - item.start) :].copy())
                if item.reaches_end:
                    self._leave(request, "finished")

    def _choose(self, logits: object, choosing: dict[int, Request]) -> None:
        """Sample the given rows of the logits and append each request's token."""
        table = [None] * (max(choosing) + 1)
        for row, request in choosing.items():
            table[row] = (request.params, request.seed, len(request.sequence.tokens))
        n_top = max(r.params.logprobs for r in choosing.values())
        sampled = self.runner.sample(logits, table, n_top)
        host = {name: np.asarray(getattr(sampled, name)) for name in sampled.__dataclass_fields__}
        for row, request in choosing.items():
            if not host["finite"][row]:
                at = len(request.sequence.tokens)
                request.error = NonFiniteLogitsError(f"the logits for position {at} hold NaN or infinity")
                self._leave(request, "failed")
                continue
            token, logprob = int(host["tokens"][row]), float(host["logprobs"][row])
            top = zip(host["top_tokens"][row].tolist(), host["top_logprobs"][row].tolist(), strict=True)
            others = (pair for pair in itertools.islice(top, request.params.logprobs) if pair[0] != token)
            pairs = ((token, logprob), *others) if request.params.logprobs else ()
            request.sequence.tokens.append(token)
            self._counts["generated"] += 1
            if request.output.push(token, logprob, pairs).finish_reason is not None:
                self._leave(request, "finished")


def _chooses(work: Work) -> bool:
    return work.reaches_end and not work.sequence.all_logits
