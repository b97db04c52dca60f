"""One step of the engine: schedule rows, run them, sample, hand tokens and rows to their requests."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from oxjax.engine.active import ActiveRequests
from oxjax.engine.beams import Hypothesis
from oxjax.engine.request import Generation, Scoring, score_records
from oxjax.engine.runner import DecodeRow, ModelOutput, Runner, SampleRow
from oxjax.engine.scheduler import ScheduledChunk, Scheduler
from oxjax.errors import RequestError
from oxjax.sampling.packing import SamplingInputs
from oxjax.sampling.sampled import SampledToken, sampled_tokens

CALL_SECONDS = 0.04  # longest decode call; bounds the delay for new requests, cancellation and streaming


class Loop:
    """Runs steps for the requests of an engine.

    Args:
        runner: the device side.
        scheduler: decides which rows run.
        active: the requests.
        steps_per_call: most decode steps of one call of the device.

    Attributes:
        step_seconds: seconds of a decode step in the last call of several; it bounds the steps of the next.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, active: ActiveRequests, steps_per_call: int):
        self.runner = runner
        self.scheduler = scheduler
        self.active = active
        self.steps_per_call = steps_per_call
        self.step_seconds = math.inf

    def step(self) -> None:
        """Run one batch, or several steps of one that decodes. If the device fails, no request has advanced."""
        start = time.perf_counter_ns()
        work = self.scheduler.schedule()
        if not work:
            return
        only_decodes = len(work) == len(self.scheduler.running) and all(w.decodes for w in work)
        requests = [self.active.by_sequence[w.sequence] for w in work] if only_decodes else []
        if only_decodes and not any(r.is_guided for r in requests):
            device = self._decode(work, requests)
        else:
            device = self._run(work)
        counts = self.active.counts
        counts["nanoseconds"] += time.perf_counter_ns() - start
        counts["host nanoseconds"] += time.perf_counter_ns() - start - device

    def _decode(self, work: list[ScheduledChunk], requests: list[Generation]) -> int:
        """Decode all running sequences; returns the device's nanoseconds."""
        n_left = [w.sequence.max_length - len(w.sequence.tokens) for w in work]
        wanted = min(self.steps_per_call, max(n_left), max(1, int(CALL_SECONDS / self.step_seconds)))
        n_steps = self.scheduler.reserve_ahead(work, wanted)
        someone_waits = self.scheduler.n_waiting > 0  # for the place of one that ends
        rows = [
            DecodeRow(w, r.metadata, r.output.sampling_inputs(w.sequence.tokens), min(n, n_steps), someone_waits)
            for w, r, n in zip(work, requests, n_left, strict=True)
        ]
        device = time.perf_counter_ns()
        n_steps, columns = self.runner.decode(rows, max(r.params.logprobs for r in requests))
        device = time.perf_counter_ns() - device
        self.step_seconds = device / 1e9 / n_steps
        by_sequence = [column[:n_steps, : len(work)].swapaxes(0, 1).tolist() for column in columns]
        taken, finished = [], []
        for w, request, *sampled in zip(work, requests, *by_sequence, strict=True):
            n_rows = 0
            for entry in zip(*sampled, strict=True):
                n_rows += 1
                if self._accept(request, SampledToken(*entry)):
                    finished.append(request)
                    break
            taken.append(ScheduledChunk(w.sequence, w.start, n_rows))
        # A row's steps after its end are not counted: its state goes when it leaves.
        self.scheduler.commit(taken, n_steps)
        for request in finished:
            self.active.leave(request)
        self.active.counts["rows"] += sum(w.n_rows for w in taken)
        return device

    def _accept(self, request: Generation, sampled: SampledToken) -> bool:
        before = len(request.output.chunks)
        finished = request.accept(sampled)
        self.active.counts["generated"] += len(request.output.chunks) - before
        return finished

    def _run(self, work: list[ScheduledChunk]) -> int:
        """Run rows of all kinds; returns the device's nanoseconds."""
        samples = {row: self.active.by_sequence[w.sequence] for row, w in enumerate(work) if w.chooses}
        device = time.perf_counter_ns()
        ran = self.runner.run(work)
        sampled = self._sample(ran.last, samples) if samples else []
        found = self._wanted_rows(ran, work)
        device = time.perf_counter_ns() - device
        # The device has done its part: only now has anything advanced.
        self.scheduler.commit(work)
        finished = [request for request, rows in found if request.accept(rows)]
        self._fork_followers(work)
        for request in finished:
            self.active.leave(request)
        self._deliver_tokens(list(samples.values()), sampled)
        self.active.counts["rows"] += sum(w.n_rows for w in work)
        return device

    def _sample(self, logits: Any, samples: dict[int, Generation]) -> list[SampledToken]:
        """Sample a token from rows of logits, for the request of each row."""
        rows = [SampleRow(row, request.metadata, self._inputs(request)) for row, request in samples.items()]
        return sampled_tokens(self.runner.sample(logits, rows, max(r.params.logprobs for r in samples.values())))

    @staticmethod
    def _inputs(request: Generation) -> SamplingInputs:
        """Inputs of the request's next token; it fails if its grammar has none."""
        try:
            return request.output.sampling_inputs(request.sequence.tokens)
        except RequestError as error:
            request.error = error
            return SamplingInputs(request.sequence.tokens)

    def _wanted_rows(self, ran: ModelOutput, work: list[ScheduledChunk]) -> list[tuple[Any, np.ndarray]]:
        """Logits, hidden states and scores of these rows, for the requests that want them, on the host."""
        found: list[tuple[Any, np.ndarray]] = []
        arrays = {
            kind: np.asarray(ran.hidden if kind == "hidden" else ran.logits).astype(np.float32)
            for kind in {w.sequence.output_kind for w in work} - {None, "scores"}
        }
        scored: list[tuple[Scoring, int]] = []  # and its number of rows here
        rows: list[int] = []
        targets: list[int] = []
        end = 0
        for w in work:
            begin, end = end, end + w.n_rows
            sequence, first = w.sequence, max(w.start, w.sequence.next_output_row)
            if sequence.output_kind is None or first >= w.stop:
                continue
            request, first_row = self.active.by_sequence[sequence], begin + first - w.start
            if not isinstance(request, Scoring):
                found.append((request, arrays[sequence.output_kind][first_row:end].copy()))
                continue
            base = len(sequence.tokens) - len(request.targets)  # the row that scores the first target
            rows += range(first_row, end)
            targets += request.targets[first - base : w.stop - base]
            scored.append((request, end - first_row))
            if w.stop == sequence.fork_at:
                followers = [r for r in request.followers if not r.done]
                rows += [end - 1] * len(followers)
                targets += [r.targets[0] for r in followers]
                scored += [(r, 1) for r in followers]
        if scored:
            columns, end = self.runner.score(ran.hidden, rows, targets, max(r.n_top for r, _ in scored)), 0
            for request, n in scored:
                begin, end = end, end + n
                found.append((request, score_records(columns, slice(begin, end), request.n_top)))
        return found

    def _fork_followers(self, work: list[ScheduledChunk]) -> None:
        """Fork the requests that share what a sequence has computed now: samples of a prompt, scores of a context."""
        for w in work:
            if w.stop == w.sequence.fork_at:
                request = self.active.by_sequence[w.sequence]
                followers, request.followers = [r for r in request.followers if not r.done], ()
                sequences = [r.sequence for r in followers if r.needs_rows]
                for sequence in (w.sequence, *sequences):
                    sequence.fork_at, sequence.reserved_seqs = 0, 1
                self.scheduler.fork(w.sequence, *sequences)

    def _deliver_tokens(self, requests: list[Generation], sampled: list[SampledToken]) -> None:
        """Hand sampled tokens to their requests."""
        for request, token in zip(requests, sampled, strict=True):
            if self._accept(request, token):
                self.active.leave(request)
        for search in {r.search for r in requests if isinstance(r, Hypothesis)}:
            search.advance(self.active)
