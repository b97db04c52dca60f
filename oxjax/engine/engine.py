"""The loop: schedule rows, run them, sample, hand tokens to their requests."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from oxjax.cache.blocks import BlockAllocator
from oxjax.cache.prefix import PrefixCache, root_key
from oxjax.cache.states import SLOTS_PER_SEQUENCE, StatePool
from oxjax.constrain.matcher import GrammarCompiler, Matcher
from oxjax.engine.beams import BeamParams, BeamSearch
from oxjax.engine.choice import Choice, Moment
from oxjax.engine.decode import MAX_STEPS
from oxjax.engine.metrics import Metrics
from oxjax.engine.output import Output
from oxjax.engine.request import Request, score_records
from oxjax.engine.runner import Decoding, Ran, Runner, Wanted
from oxjax.engine.scheduler import Scheduler, Sequence, Work
from oxjax.engine.snapshot import Entry, Host, decode, encode, model_fingerprint, state_specs
from oxjax.errors import InvalidRequestError, NonFiniteLogitsError, NothingLeftError, RequestError, SnapshotError
from oxjax.models.load import Model
from oxjax.sampling.edits import edits_of
from oxjax.sampling.params import SamplingParams, sample_seed
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


class Engine:
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

    def generate(self, prompt: list[int], params: SamplingParams, seed: int, *, priority: int = 0) -> Request:
        """Queue a prompt to be continued.

        Args:
            prompt: token ids.
            params: how.
            seed: of the draws; `params.seed` is not looked at.
            priority: requests of a higher one go first; see `Sequence.priority`. It changes no result.

        Raises:
            InvalidRequestError: it names tokens that are not there, or forbids all.
            RequestTooLargeError: it can never fit. Nothing is queued.
        """
        requests = [self._new(prompt, params, sample_seed(seed, i), priority) for i in range(params.n_samples)]
        leader, *others = requests
        self.scheduler.check(leader.sequence)
        if params.prompt_logprobs is not None:  # first, so that the others find the prompt's state
            leader.scored = self.score(prompt, params.prompt_logprobs, priority=priority)
        leader.samples = leader.unborn = tuple(others)
        self._add(leader)
        for request in others:
            self._admit(request)
        return leader

    def _new(self, prompt: list[int], params: SamplingParams, seed: int, priority: int) -> Request:
        room = self.scheduler.max_context - len(prompt)
        max_new = max(1, room) if params.max_tokens is None else params.max_tokens
        sequence = Sequence(tokens=list(prompt), max_length=len(prompt) + max_new, priority=priority)
        output = Output(self.tokenizer, prompt, params, max_new, self._matcher(params))
        edits = edits_of(params, self.tokenizer.eog_ids, len(prompt), self.runner.config.vocab_size)
        return Request(sequence, params, seed, output, Choice(params, seed, edits))

    def _matcher(self, params: SamplingParams) -> Matcher | None:
        return None if params.grammar is None else self._grammars.start(params.grammar)

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        return GrammarCompiler(self.tokenizer, self.runner.config.vocab_size)

    def logits(self, prompt: list[int], *, priority: int = 0) -> Request:
        """Queue a prompt whose logits are wanted at every position; errors as for `generate`."""
        return self._add(Request(self._whole(prompt, "logits", priority)))

    def hidden(self, prompt: list[int], *, priority: int = 0) -> Request:
        """Queue a prompt whose hidden states after the final norm are wanted at every position.

        They come in chunks as `logits` does, into `Request.rows`; errors as for `generate`.
        """
        return self._add(Request(self._whole(prompt, "hidden", priority)))

    def score(self, prompt: list[int], n_top: int = 0, *, priority: int = 0) -> Request:
        """Queue a prompt of which is wanted how likely each token is after those before it; errors as for `generate`.

        Records of `score_records` come into `Request.rows`: that of row `t` is token `t + 1`'s, and the last one, after
        which none comes, means nothing. At no time are there logits of more than some rows.

        Args:
            prompt: token ids.
            n_top: how many of the most likely tokens to report at each position.
            priority: as for `generate`.
        """
        return self._add(Request(self._whole(prompt, "scores", priority), n_top=n_top))

    @staticmethod
    def _whole(prompt: list[int], wants: str, priority: int) -> Sequence:
        return Sequence(list(prompt), len(prompt), all_logits=True, priority=priority, wants=wants)

    def beam_search(
        self, prompt: list[int], params: SamplingParams, beams: BeamParams, *, priority: int = 0
    ) -> BeamSearch:
        """Queue a prompt whose most likely continuations are wanted.

        Its beginnings are sequences that share the state of what they have in common. In exact mode the result depends
        on neither other requests nor on how many beginnings run at once.

        Args:
            prompt: token ids.
            params: what may be chosen and when texts end: biases, bans, penalties, DRY, grammar, stops and lengths, at
                temperature 0.
            beams: how wide, and what is best.
            priority: as for `generate`.

        Raises:
            InvalidRequestError: `params` asks for draws, samples or log-probabilities.
            RequestTooLargeError: it can never fit. Nothing is queued.
        """
        if params.temperature > 0.0 or params.n_samples != 1 or params.logprobs or params.prompt_logprobs is not None:
            raise InvalidRequestError("a beam search neither draws nor reports: temperature 0, n 1 and logprobs 0")
        n_ends = len(params.stop_token_ids) + (0 if params.ignore_eos else len(self.tokenizer.eog_ids))
        root = self._new(prompt, params, 0, priority)
        root.search = BeamSearch(beams, root, n_ends)
        n_offers = min(root.search.n_offers, self.runner.config.vocab_size)
        # Of the model itself where nothing changes its distribution: that is the same, and costs less.
        changes = bool(len(root.choice.edits)) or params.penalizes or root.output.is_guided
        params = dataclasses.replace(params, logprobs=n_offers, logprobs_of="sampling" if changes else "model")
        root.params, root.choice = params, Choice(params, 0, root.choice.edits)
        self._add(root)
        return root.search

    def _add(self, request: Request) -> Request:
        self.scheduler.add(request.sequence)
        return self._admit(request)

    def _admit(self, request: Request) -> Request:
        self._requests[request.sequence] = request
        self._counts["requests"] += 1
        return request

    def fork(
        self,
        request: Request,
        *,
        length: int | None = None,
        params: SamplingParams | None = None,
        seed: int | None = None,
    ) -> Request:
        """Queue a request that goes on from where another one is, or was; nothing of what they share is computed twice.

        Args:
            request: a generating one, in any state, done or not.
            length: tokens to share, from the whole prompt to all there are (None).
            params: for what follows; the same ones unless given. `n` must be 1.
            seed: of its draws; the same one unless given, which with the same parameters gives the same tokens.

        Raises:
            InvalidRequestError: `length` is not one of those, or the shared tokens end a request with these parameters.
            RequestTooLargeError: it can never fit. Nothing is queued.
        """
        if params is None:
            params = dataclasses.replace(request.params or SamplingParams(), n=1, best_of=None)
        if request.params is None or params.n_samples != 1:
            raise InvalidRequestError("only requests that generate can be forked, into one more each time")
        tokens = self._beginning(request, length)
        child = self._new(tokens[: request.n_prompt], params, request.seed if seed is None else seed, 0)
        child.sequence.tokens, child.sequence.priority = tokens, request.sequence.priority
        child.output.replay(request.output.chunks[: len(tokens) - request.n_prompt])
        self.scheduler.fork(request.sequence, child.sequence)
        return self._admit(child)

    def rewind(self, request: Request, length: int) -> None:
        """Take a request back to when it had `length` tokens, prompt included, and let it go on from there.

        It draws the same tokens again, since draws depend on seed and position; `fork` goes on otherwise. Recurrent
        layers go back to their last checkpoint and compute what lies between again. A request that is done comes
        back. Nothing happens at its own length.

        Raises:
            InvalidRequestError: shorter than the prompt, longer than the request, or it does not generate; nothing
                was changed.
        """
        tokens = self._beginning(request, length)
        if len(tokens) == len(request.sequence.tokens):
            return
        n_new = len(tokens) - request.n_prompt
        prompt, params = tokens[: request.n_prompt], request.params
        output = Output(self.tokenizer, prompt, params, request.output.max_new, self._matcher(params))
        request.output = output.replay(request.output.chunks[:n_new])
        request.sequence.tokens = tokens
        self.scheduler.rewind(request.sequence)
        if request.done:
            request.done, request.error = False, None
            self._admit(request)

    @staticmethod
    def _beginning(request: Request, length: int | None) -> list[int]:
        tokens = request.sequence.tokens
        length = len(tokens) if length is None else length
        if request.params is None or not request.n_prompt <= length <= len(tokens):
            raise InvalidRequestError(
                f"a length of {length}, for a request with {request.n_prompt} tokens of prompt and {len(tokens)} in all"
                + (" that generates nothing" if request.params is None else "")
            )
        return tokens[:length]

    def snapshot(self, requests: Iterable[Request] | None = None) -> bytes:
        """Everything about requests in the engine, so that `resume` can go on in another process.

        The engine goes on as if nothing had happened. A snapshot takes about as many bytes as the state of its
        requests, and some four times that in memory while it is made. The first one reads all parameters.

        Args:
            requests: those wanted; None is all of them. Those that are done are left out.

        Raises:
            SnapshotError: one of them wants hidden states, scores or beams, which snapshots have no place for.
        """
        order = {sequence: i for i, sequence in enumerate(self.scheduler)}
        chosen = list(self._requests.values() if requests is None else requests)
        chosen = sorted((r for r in chosen if not r.done), key=lambda r: order.get(r.sequence, len(order)))
        if any(r.search or (r.sequence.all_logits and r.sequence.wants != "logits") for r in chosen):
            raise SnapshotError(
                "hidden states, scores and beams have no place in snapshots: let who wants them end first"
            )
        entries = [Entry(r.sequence, r.params, r.seed, r.output, r.choice, r.rows) for r in chosen]
        return encode(self._host, entries, [self._saved(r.sequence) for r in chosen])

    def _saved(self, sequence: Sequence) -> Any:
        return self.pool.export(sequence.state) if sequence.n_computed else sequence.saved

    def resume(self, blob: bytes) -> list[Request]:
        """Queue the requests of a snapshot, behind those that are here, to go on where they were.

        The engine may have other pages, batch sizes and limits than the one that made the snapshot, and requests of
        its own. State waits on the host until there is room. In exact mode the requests give the same bits as they
        would have given there.

        Returns:
            The requests in their order there; those that were done are not among them, and samples of one prompt
            are requests on their own.

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
        fingerprint = model_fingerprint(config, self.runner.params)
        return Host(fingerprint, config.vocab_size, self.tokenizer, self._matcher, *state_specs(state))

    def cancel(self, request: Request) -> None:
        """Drop a request, whatever its state; its pages are free at once. Nothing happens to one that is done.

        Other samples of its prompt go on.
        """
        if not request.done:
            self._leave(request, "cancelled")

    def cancel_beams(self, search: BeamSearch) -> None:
        """Drop a beam search; nothing happens to one that is done."""
        if not search.done:
            search.drop(search.live, self.scheduler, self._requests)
            search.done = True
            self._counts["cancelled"] += 1

    def _leave(self, request: Request, how: str) -> None:
        self.scheduler.remove(request.sequence)
        del self._requests[request.sequence]
        request.done = True
        self._counts[how] += 1
        unborn = [r for r in request.unborn if not r.done]
        request.unborn = ()
        if unborn:  # the first of them computes the prompt instead
            self.scheduler.add(unborn[0].sequence)
            unborn[0].unborn = tuple(unborn[1:])

    def step(self) -> None:
        """Run one batch, or several steps of one that decodes, and hand out what it gave.

        Does nothing when no request is in the engine. If the device fails, no request has advanced.
        """
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
            if w.reaches_end and not w.sequence.all_logits
            for chooser in self._choosers(row, self._requests[w.sequence])
        ]
        device = time.perf_counter_ns()
        ran = self.runner.run(work)
        sampled = self._sample(ran.last, choosing) if choosing else {}
        found = {
            kind: self._rows(kind, ran, work) for kind in {w.sequence.wants for w in work if w.sequence.all_logits}
        }
        device = time.perf_counter_ns() - device
        # The device has done its part: only now has anything advanced.
        self.scheduler.commit(work)
        self._collect_rows(work, found)
        if choosing:
            self._deliver(choosing, sampled)
        self._counts["rows"] += sum(w.n_rows for w in work)
        return device

    def _rows(self, kind: str, ran: Ran, work: list[Work]) -> np.ndarray | dict[str, np.ndarray]:
        """What some want of every row, on the host, a line for each row of the batch; scores by their fields."""
        if kind != "scores":
            return np.asarray(ran.hidden if kind == "hidden" else ran.logits).astype(np.float32)
        targets = np.zeros(len(ran.hidden), np.int32)
        row = n_top = 0
        for sequence, start, n_rows in work:
            following = sequence.tokens[start + 1 : start + 1 + n_rows]
            targets[row : row + len(following)] = following
            row += n_rows
            n_top = max(n_top, self._requests[sequence].n_top)
        return self.runner.score(ran.hidden, targets, n_top)

    @staticmethod
    def _choosers(row: int, request: Request) -> list[_Chooser]:
        """Those that choose a token from a request's row of logits: itself, and its unborn samples."""
        return [_Chooser(row, request), *(_Chooser(row, r, request) for r in request.unborn if not r.done)]

    def _collect_rows(self, work: list[Work], found: dict[str, np.ndarray | dict[str, np.ndarray]]) -> None:
        """Hand what was found of every row, by what is wanted, to the requests that want it."""
        end = 0
        for sequence, start, n_rows in work:
            end += n_rows
            if sequence.all_logits:
                request = self._requests[sequence]
                known = sum(map(len, request.rows))  # rows that came before a preemption
                new = slice(end - n_rows + max(0, known - start), end)
                rows = found[sequence.wants]
                scored = sequence.wants == "scores"
                request.rows.append(score_records(rows, new, request.n_top) if scored else rows[new].copy())
                if start + n_rows == len(sequence.tokens):
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
            pairs = (token, logprob), *(pair for pair in top if pair[0] != token)
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
