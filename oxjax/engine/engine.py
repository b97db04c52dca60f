"""The loop: schedule rows, run them, sample, hand tokens to their requests."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from oxjax.cache.blocks import BlockAllocator
from oxjax.cache.prefix import PrefixCache, root_key
from oxjax.cache.states import SLOTS_PER_SEQUENCE, StatePool
from oxjax.engine.choice import Moment
from oxjax.engine.decode import MAX_STEPS
from oxjax.engine.front import Front
from oxjax.engine.metrics import Metrics
from oxjax.engine.request import Request, score_records
from oxjax.engine.runner import Decoding, Ran, Runner, Wanted
from oxjax.engine.scheduler import Scheduler, Sequence, Work
from oxjax.errors import EngineClosedError, NonFiniteLogitsError, NothingLeftError, RequestError
from oxjax.models.load import Model
from oxjax.sampling.pipeline import NOT_FINITE, NOTHING_LEFT

log = logging.getLogger("oxjax")
# Columns of `Sampled` and `Decoded`.
_CHOICE = "tokens", "logprobs", "ranks", "top_tokens", "top_logprobs", "mus", "faults"

_FAULTS = {
    NOT_FINITE: lambda at: NonFiniteLogitsError(f"the logits for position {at} hold NaN or infinity"),
    NOTHING_LEFT: lambda at: NothingLeftError(f"no token may follow at position {at}: all are forbidden"),
}
CALL_SECONDS = 0.04  # of decoding without the host: so long waits whoever comes, cancels or reads a stream


class _Chooser(NamedTuple):
    """A request that chooses from a row of logits, its own or, while it is unborn, its parent's."""

    row: int
    request: Request
    parent: Request | None = None


class Engine(Front):
    """Continuous batching over one model.

    Args:
        model: loaded.
        n_pages: pages of the pool, the null page included.
        page_size: tokens of a page; a divisor of the attention block.
        max_batch: sequences that run at once.
        max_rows: rows of a step.
        max_context: tokens that a sequence may reach.
        reuse_prefixes: find the state of prompts that begin as others did instead of computing it.
        swap: keep the state of a preempted request on the host instead of computing it again.
        n_checkpoints: recurrent states that are kept for reuse and rewinding, for models with recurrent layers.
        checkpoint_every: tokens between them; a multiple of `page_size`.
        steps_per_call: most decode steps that the device takes without the host, up to `MAX_STEPS`. Fewer are taken
            where that takes long. It changes no result.
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
        n_checkpoints: int = 16,
        checkpoint_every: int = 256,
        steps_per_call: int = MAX_STEPS,
    ):
        if not 1 <= steps_per_call <= MAX_STEPS:
            raise ValueError(f"{steps_per_call} steps per call: expected 1 to {MAX_STEPS}")
        self.tokenizer, config = model.tokenizer, model.config
        n_slots = 1 + SLOTS_PER_SEQUENCE * max_batch + n_checkpoints if config.slot_bytes else 1
        self.runner = Runner(
            config,
            model.params,
            n_pages=n_pages,
            page_size=page_size,
            max_batch=max_batch,
            max_rows=max_rows,
            max_context=max_context,
            n_slots=n_slots,
            end_ids=self.tokenizer.eog_ids,
        )
        pages = BlockAllocator(n_pages) if config.page_bytes(1) else None
        slots = BlockAllocator(n_slots, "slot") if config.slot_bytes else None
        if slots is not None and not n_checkpoints and reuse_prefixes:
            reuse_prefixes = False
            log.warning("prefixes are not reused: this model has recurrent layers, and no checkpoints are kept")
        prefix = None
        if reuse_prefixes:
            root = root_key(model=repr(config))  # the cache lives no longer than these parameters do
            prefix = PrefixCache(pages, page_size, root, slots=slots, checkpoint_every=checkpoint_every)
        self.pool = StatePool(self.runner, page_size=page_size, pages=pages, slots=slots, prefix=prefix)
        self.scheduler = Scheduler(
            self.pool, max_batch=max_batch, max_rows=max_rows, max_context=max_context, swap=swap
        )
        self._steps_per_call, self._step_seconds = steps_per_call, math.inf
        self._requests: dict[Sequence, Request] = {}
        self._counts: Counter[str] = Counter()

    def metrics(self) -> Metrics:
        """What the engine has done since it was made, and how full it is now."""
        scheduler, pages, slots, prefix = self.scheduler, self.pool.pages, self.pool.slots, self.pool.prefix
        return Metrics(
            **{name: self._counts[name] for name in ("requests", "finished", "failed", "cancelled")},
            steps=scheduler.steps,
            computed_tokens=self._counts["rows"],
            cached_tokens=prefix.saved_tokens if prefix else 0,
            generated_tokens=self._counts["generated"],
            step_seconds=self._counts["nanoseconds"] / 1e9,
            host_seconds=self._counts["host nanoseconds"] / 1e9,
            running=len(scheduler.running),
            waiting=scheduler.n_waiting,
            preemptions=scheduler.preemptions,
            reuses_prefixes=prefix is not None,
            prefix_hits=prefix.hits if prefix else 0,
            prefix_misses=prefix.misses if prefix else 0,
            evictions=pages.evictions if pages else 0,
            pages=pages.capacity if pages else 0,
            pages_used=pages.used_count if pages else 0,
            pages_cached=pages.cached_count if pages else 0,
            pages_peak=pages.peak_used if pages else 0,
            page_bytes=self.runner.config.page_bytes(self.pool.page_size),
            slots=slots.capacity if slots else 0,
            slots_used=slots.used_count if slots else 0,
            checkpoints=slots.cached_count if slots else 0,
            checkpoint_evictions=slots.evictions if slots else 0,
            slot_bytes=self.runner.config.slot_bytes,
            compilations=self.runner.compilations.total(),
        )

    def close(self) -> None:
        """Let go of parameters and state, whoever still holds the engine: a request, a stream, an error's traceback."""
        self.runner.params = self.runner.state = None

    def step(self) -> None:
        """Run one batch, or several steps of one that decodes, and hand out what it gave.

        Does nothing when no request is in the engine. If the device fails, no request has advanced.

        Raises:
            EngineClosedError: the engine was closed.
        """
        if self.runner.params is None:
            raise EngineClosedError("this engine was closed")
        start = time.perf_counter_ns()
        work = self.scheduler.schedule()
        if not work:
            return
        alone = len(work) == len(self.scheduler.running) and all(w.decodes for w in work)
        if alone and not any(r.unborn or r.is_guided for r in (self._requests[w.sequence] for w in work)):
            device = self._decode(work)
        else:
            device = self._run(work)
        self._counts["nanoseconds"] += time.perf_counter_ns() - start
        self._counts["host nanoseconds"] += time.perf_counter_ns() - start - device

    def _decode(self, work: list[Work]) -> int:
        """Let all running sequences decode; returns the device's nanoseconds."""
        requests = [self._requests[w.sequence] for w in work]
        n_left = [w.sequence.max_length - len(w.sequence.tokens) for w in work]
        wanted = min(self._steps_per_call, max(n_left), max(1, int(CALL_SECONDS / self._step_seconds)))
        n_steps = self.scheduler.reserve_ahead(work, wanted)
        someone_waits = self.scheduler.n_waiting > 0  # for a place, which who ends leaves
        rows = [
            Decoding(w, r.choice, r.output.moment(w.sequence.tokens), min(n, n_steps), someone_waits)
            for w, r, n in zip(work, requests, n_left, strict=True)
        ]
        device = time.perf_counter_ns()
        decoded = self.runner.decode(rows, max(r.params.logprobs for r in requests))
        device = time.perf_counter_ns() - device
        n_steps = int(decoded["n_steps"])
        self._step_seconds = device / 1e9 / n_steps
        columns = [decoded[name][:n_steps, : len(work)].swapaxes(0, 1).tolist() for name in _CHOICE]
        taken, leaving = [], []
        for w, request, *choices in zip(work, requests, *columns, strict=True):
            n_rows = 0
            for choice in zip(*choices, strict=True):
                n_rows += 1
                if how := self._take(request, *choice):
                    leaving.append((request, how))
                    break
            taken.append(Work(w.sequence, w.start, n_rows))
        # A row's steps after its end are not counted: its state goes when it leaves.
        self.scheduler.commit(taken, n_steps)
        for request, how in leaving:
            self._leave(request, how)
        self._counts["rows"] += sum(w.n_rows for w in taken)
        return device

    def _run(self, work: list[Work]) -> int:
        """Run rows of all kinds; returns the device's nanoseconds."""
        choosing = [
            chooser
            for row, w in enumerate(work)
            if w.chooses
            for chooser in self._choosers(row, self._requests[w.sequence])
        ]
        device = time.perf_counter_ns()
        ran = self.runner.run(work)
        sampled = self._sample(ran.last, choosing) if choosing else {}
        found = self._wanted_rows(ran, work)
        device = time.perf_counter_ns() - device
        # The device has done its part: only now has anything advanced.
        self.scheduler.commit(work)
        self._hand_out(work, found)
        if choosing:
            self._deliver(choosing, sampled)
        self._counts["rows"] += sum(w.n_rows for w in work)
        return device

    def _wanted_rows(self, ran: Ran, work: list[Work]) -> list[tuple[Request, np.ndarray]]:
        """What requests get of these rows, on the host."""
        found: list[tuple[Request, np.ndarray]] = []
        arrays = {
            kind: np.asarray(ran.hidden if kind == "hidden" else ran.logits).astype(np.float32)
            for kind in {w.sequence.wants for w in work} - {None, "scores"}
        }
        scored: list[tuple[Request, int]] = []  # and how many of its tokens
        rows: list[int] = []
        targets: list[int] = []
        end = 0
        for w in work:
            begin, end = end, end + w.n_rows
            sequence, first = w.sequence, max(w.start, w.sequence.first)
            if sequence.wants is None or first >= w.stop:
                continue
            request, first_row = self._requests[sequence], begin + first - w.start
            if sequence.wants != "scores":
                found.append((request, arrays[sequence.wants][first_row:end].copy()))
                continue
            base = len(sequence.tokens) - len(request.targets)  # the row that scores the first target
            rows += range(first_row, end)
            targets += request.targets[first - base : w.stop - base]
            scored.append((request, end - first_row))
            if w.stop == sequence.pause:
                unborn = [r for r in request.unborn if not r.done]
                rows += [end - 1] * len(unborn)
                targets += [r.targets[0] for r in unborn]
                scored += [(r, 1) for r in unborn]
        if scored:
            columns, end = self.runner.score(ran.hidden, rows, targets, max(r.n_top for r, _ in scored)), 0
            for request, n in scored:
                begin, end = end, end + n
                found.append((request, score_records(columns, slice(begin, end), request.n_top)))
        return found

    @staticmethod
    def _choosers(row: int, request: Request) -> list[_Chooser]:
        """Those that choose a token from a request's row of logits: itself, and its unborn samples."""
        return [_Chooser(row, request), *(_Chooser(row, r, request) for r in request.unborn if not r.done)]

    def _hand_out(self, work: list[Work], found: list[tuple[Request, np.ndarray]]) -> None:
        """Give requests what they want of their rows; those that waited for a context begin where it ends."""
        for request, rows in found:
            request.rows.append(rows)
            request.sequence.first += len(rows)
        for w in work:
            if w.sequence.wants is None:
                continue
            request = self._requests[w.sequence]
            if w.stop == w.sequence.pause:
                unborn, request.unborn = [r for r in request.unborn if not r.done], ()
                self.scheduler.fork(w.sequence, *(r.sequence for r in unborn if len(r.targets) > 1))
                for r in unborn:
                    if len(r.targets) == 1:
                        self._leave(r, "finished")
            if w.reaches_end:
                self._leave(request, "finished")

    def _sample(self, logits: Any, choosing: list[_Chooser]) -> dict[str, np.ndarray]:
        """Choose a token for each; the columns of `Sampled`, on the host."""
        rows = [Wanted(row, r.choice, self._moment(r)) for row, r, _ in choosing]
        return self.runner.sample(logits, rows, max(r.params.logprobs for _, r, _ in choosing))

    @staticmethod
    def _moment(request: Request) -> Moment:
        """What the request's next token depends on; if that cannot be said, the request has failed."""
        try:
            return request.output.moment(request.sequence.tokens)
        except RequestError as error:
            request.error = error
            return Moment(request.sequence.tokens)

    def _deliver(self, choosing: list[_Chooser], sampled: dict[str, np.ndarray]) -> None:
        """Hand what was chosen to the requests; those that were unborn begin before their parent goes on."""
        columns = [sampled[name].tolist() for name in _CHOICE]
        for (_, request, parent), *choice in reversed(list(zip(choosing, *columns, strict=True))):
            if parent is None:
                request.unborn = ()
            if how := self._take(request, *choice):
                self._leave(request, how)
            elif parent is not None:
                self.scheduler.fork(parent.sequence, request.sequence)
        for search in {c.request.search for c in choosing} - {None}:
            search.advance(self.scheduler, self._requests)
            if search.done:
                self._counts["failed" if search.error else "finished"] += 1

    def _take(
        self,
        request: Request,
        token: int,
        logprob: float,
        rank: int,
        top_tokens: list[int],
        top_logprobs: list[float],
        mu: float,
        fault: int,
    ) -> str | None:
        """Append what was chosen for a request; returns how it leaves, if it does."""
        tokens, n_top = request.sequence.tokens, request.params.logprobs
        if request.error is None and fault and not (request.search is not None and fault == NOTHING_LEFT):
            request.error = _FAULTS[fault](len(tokens))
        if request.error is not None:
            return None if request.search is not None else "failed"
        if request.search is not None:  # where nothing is left, the others may go on
            request.offers = [] if fault else list(zip(top_tokens[:n_top], top_logprobs[:n_top], strict=True))
            return None
        pairs: tuple[tuple[int, float], ...] = ()
        if n_top:
            top = zip(top_tokens[:n_top], top_logprobs[:n_top], strict=True)
            pairs = (token, logprob), *((i, x) for i, x in top if i != token and x > -math.inf)
        try:
            chunk = request.output.push(
                token, logprob, pairs, rank if n_top else None, mu if request.params.mirostat else None
            )
        except RequestError as error:
            request.error = error
            return "failed"
        tokens.append(token)
        self._counts["generated"] += 1
        return "finished" if chunk.finish_reason is not None else None
