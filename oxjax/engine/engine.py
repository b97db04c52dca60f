"""The loop: schedule rows, run them, sample, hand tokens to their requests."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np

from oxjax.cache.blocks import PageAllocator
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
    """

    def __init__(self, model: Model, *, n_pages: int, page_size: int, max_batch: int, max_rows: int, max_context: int):
        self.tokenizer = model.tokenizer
        self.scheduler = Scheduler(
            PageAllocator(n_pages),
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
        return request

    def cancel(self, request: Request) -> None:
        """Drop a request, whatever its state; its pages are free at once."""
        if not request.done:
            self.scheduler.remove(request.sequence)
            del self._requests[request.sequence]
            request.done = True

    def step(self) -> None:
        """Run one batch and hand out what it gave. Does nothing when no request is in the engine.

        If the step itself fails, no request has advanced.
        """
        work = self.scheduler.schedule()
        if not work:
            return
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

    def _collect_logits(self, work: list[Work], logits: np.ndarray, ends: np.ndarray) -> None:
        for item, end in zip(work, ends, strict=True):
            if item.sequence.all_logits:
                request = self._requests[item.sequence]
                request.logits.append(logits[end - item.n_rows : end].copy())
                if item.reaches_end:
                    self.cancel(request)

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
                self.cancel(request)
                continue
            token, logprob = int(host["tokens"][row]), float(host["logprobs"][row])
            top = zip(host["top_tokens"][row].tolist(), host["top_logprobs"][row].tolist(), strict=True)
            others = (pair for pair in itertools.islice(top, request.params.logprobs) if pair[0] != token)
            pairs = ((token, logprob), *others) if request.params.logprobs else ()
            request.sequence.tokens.append(token)
            if request.output.push(token, logprob, pairs).finish_reason is not None:
                self.cancel(request)


def _chooses(work: Work) -> bool:
    return work.reaches_end and not work.sequence.all_logits
