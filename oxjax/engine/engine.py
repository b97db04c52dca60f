"""The engine: requests come in, are forked, rewound, saved, cancelled, and run to their ends."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, TypeVar

from oxjax.cache.allocator import PageAllocator
from oxjax.cache.prefix import PrefixCache, root_key
from oxjax.cache.states import SLOTS_PER_SEQUENCE, StatePool
from oxjax.constrain.matcher import GrammarCompiler, Matcher
from oxjax.engine.active import ActiveRequests
from oxjax.engine.beams import BeamParams, BeamSearch, Hypothesis
from oxjax.engine.config import EngineConfig
from oxjax.engine.loop import Loop
from oxjax.engine.metrics import Metrics
from oxjax.engine.output import Output
from oxjax.engine.request import Capture, Generation, Request, Scoring
from oxjax.engine.runner import Runner
from oxjax.engine.scheduler import Scheduler, Sequence
from oxjax.engine.snapshot import Entry, Host, decode, encode, model_fingerprint, state_specs
from oxjax.errors import EngineClosedError, InvalidRequestError, SnapshotError
from oxjax.models.load import Model
from oxjax.sampling.edits import edits_of
from oxjax.sampling.packing import SamplingMetadata
from oxjax.sampling.params import SamplingParams, sample_seed

_R = TypeVar("_R", Generation, Scoring, Capture)
log = logging.getLogger("oxjax")


class Engine:
    """Continuous batching over one model.

    Args:
        model: loaded.
        config: its sizes.
    """

    def __init__(self, model: Model, config: EngineConfig):
        self.config = config
        self.tokenizer = model.tokenizer
        has_slots = model.config.slot_bytes > 0
        n_slots = 1 + SLOTS_PER_SEQUENCE * config.max_batch + config.n_checkpoints if has_slots else 1
        self.runner = Runner(model.config, model.params, config, n_slots=n_slots, end_ids=self.tokenizer.eog_ids)
        pages = PageAllocator(config.n_pages) if model.config.page_bytes(1) else None
        slots = PageAllocator(n_slots, "slot") if has_slots else None
        reuse_prefixes = config.reuse_prefixes
        if slots is not None and not config.n_checkpoints and reuse_prefixes:
            reuse_prefixes = False
            log.warning("prefixes are not reused: this model has recurrent layers, and no checkpoints are kept")
        prefix = None
        if reuse_prefixes:
            root = root_key(model=repr(model.config))  # the cache lives no longer than these parameters do
            prefix = PrefixCache(pages, config.page_size, root, slots=slots, checkpoint_every=config.checkpoint_every)
        self.pool = StatePool(self.runner, page_size=config.page_size, pages=pages, slots=slots, prefix=prefix)
        self.scheduler = Scheduler(self.pool, config)
        self.active = ActiveRequests(self.scheduler)
        self.loop = Loop(self.runner, self.scheduler, self.active, config.steps_per_call)

    def metrics(self) -> Metrics:
        """Counters since the engine was made, and how full it is now."""
        scheduler, counts = self.scheduler, self.active.counts
        pages, slots, prefix = self.pool.pages, self.pool.slots, self.pool.prefix
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
            reuses_prefixes=self.pool.reuses_prefixes,
            prefix_hits=prefix.hits,
            prefix_misses=prefix.misses,
            evictions=pages.evictions,
            pages=pages.capacity,
            pages_used=pages.used_count,
            pages_cached=pages.cached_count,
            pages_peak=pages.peak_used,
            page_bytes=self.runner.config.page_bytes(self.pool.page_size),
            slots=slots.capacity,
            slots_used=slots.used_count,
            checkpoints=slots.cached_count,
            checkpoint_evictions=slots.evictions,
            slot_bytes=self.runner.config.slot_bytes,
            compilations=self.runner.compilations.total(),
        )

    def close(self) -> None:
        """Let go of parameters and state, whoever still holds the engine: a request, a stream, an error's traceback."""
        self.runner.params = self.runner.state = None

    def step(self) -> list[Request]:
        """Run one batch, or several steps of one that only decodes.

        Does nothing when no request is in the engine. If the device fails, no request has advanced.

        Returns:
            The requests that finished, with all their parts; their `on_done` has been called.

        Raises:
            EngineClosedError: the engine was closed.
            Exception: of an `on_done`; the next step calls those that are left.
        """
        if self.runner.params is None:
            raise EngineClosedError("this engine was closed")
        self.loop.step()
        return self.active.notify()

    def run(
        self,
        requests: Iterable[Request],
        on_done: Callable[[Any], None] | None = None,
        on_step: Callable[[Metrics], None] | None = None,
    ) -> None:
        """Run requests to their ends; others in the engine go on beside them.

        If it is cut short anywhere, by an interrupt or by an error of a callback, the requests that are not finished
        are cancelled.

        Args:
            requests: requests of this engine. They may be queued while they are iterated over.
            on_done: called with each request once it is finished, whoever ran its last step; in the order of
                `requests` among those of one step.
            on_step: called with the metrics after every step.

        Raises:
            ValueError: one of the requests is waited for by somebody else.
        """
        order: dict[Request, int] = {}
        ready: list[Request] = []
        try:
            for request in requests:
                if request not in order:
                    order[request] = len(order)
                    self._wait_for(request, ready)
            n_left = len(order)
            while n_left:
                ready.sort(key=order.__getitem__)
                while ready:
                    request = ready.pop(0)
                    n_left -= 1
                    if on_done is not None:
                        on_done(request)
                if n_left:
                    self.step()
                    if on_step is not None:
                        on_step(self.metrics())
        finally:
            self.cancel_all(request for request in order if request.on_done == ready.append)

    @staticmethod
    def _wait_for(request: Request, ready: list[Request]) -> None:
        """Have a request appended to a list as soon as it is done."""
        if not request.n_open:
            ready.append(request)
        elif request.on_done is None:
            request.on_done = ready.append
        else:
            raise ValueError("somebody waits for this request already")

    def generate(self, prompt: list[int], params: SamplingParams, seed: int, *, priority: int = 0) -> Generation:
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
        if params.prompt_logprobs is not None and len(prompt) > 1:  # first, so that the others find the prompt's state
            (scores,) = self.score(prompt[:1], [prompt[1:]], params.prompt_logprobs, priority=priority)
            self.active.attach(scores, leader)
            leader.prompt_scores = scores
        leader.samples = leader.followers = tuple(others)
        leader.sequence.reserved_seqs = len(requests)
        for request in requests if others else ():  # any of them may have to lead
            request.sequence.fork_at = len(prompt) - 1
        self._add(leader)
        for request in others:
            request.owner = leader
            self.active.admit(request)
        if len(prompt) == 1:  # there is nothing to share
            leader.followers, leader.sequence.reserved_seqs = (), 1
            for request in others:
                self.scheduler.add(request.sequence)
        return leader

    def _new(self, prompt: list[int], params: SamplingParams, seed: int, priority: int) -> Generation:
        room = self.scheduler.max_context - len(prompt)
        max_new = max(1, room) if params.max_tokens is None else params.max_tokens
        sequence = Sequence(tokens=list(prompt), max_length=len(prompt) + max_new, priority=priority)
        output = Output(self.tokenizer, prompt, params, max_new, self._matcher(params))
        edits = edits_of(params, self.tokenizer.eog_ids, len(prompt), self.runner.config.vocab_size)
        return Generation(sequence, params, seed, output, SamplingMetadata(params, seed, edits))

    def _matcher(self, params: SamplingParams) -> Matcher | None:
        return None if params.grammar is None else self._grammars.start(params.grammar)

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        return GrammarCompiler(self.tokenizer, self.runner.config.vocab_size)

    def logits(self, prompt: list[int], *, priority: int = 0) -> Capture:
        """Queue a prompt whose logits are wanted at every position; errors as for `generate`."""
        return self._add(Capture(self._whole(prompt, "logits", priority)))

    def hidden(self, prompt: list[int], *, priority: int = 0) -> Capture:
        """Queue a prompt whose hidden states after the final norm are wanted at every position.

        They come in chunks as `logits` does, into `Capture.rows`; errors as for `generate`.
        """
        return self._add(Capture(self._whole(prompt, "hidden", priority)))

    def score(
        self, context: list[int], continuations: Iterable[list[int]], n_top: int = 0, *, priority: int = 0
    ) -> list[Scoring]:
        """Queue continuations of a context whose tokens' log-probabilities are wanted.

        The context is computed once, and its last row says how likely each first token is. Records of `score_records`
        come into `Scoring.rows`, one for each token. At no time are there logits of more than some rows.

        Args:
            context: token ids.
            continuations: token ids each.
            n_top: how many of the most likely tokens to report at each position.
            priority: as for `generate`.

        Returns:
            A request per continuation.

        Raises:
            InvalidRequestError: context or continuation is empty.
            RequestTooLargeError: one of them can never fit. Nothing is queued.
        """
        continuations = list(continuations)
        if not context or not continuations or not all(continuations):
            raise InvalidRequestError("context and continuation: expected at least a token each")
        requests = []
        for targets in continuations:
            sequence = self._whole([*context, *targets[:-1]], "scores", priority)
            sequence.next_output_row, sequence.fork_at = len(context) - 1, len(context) if len(continuations) > 1 else 0
            self.scheduler.check(sequence)
            requests.append(Scoring(sequence, tuple(targets), n_top))
        leader = max(requests, key=lambda r: len(r.targets))
        leader.followers = tuple(r for r in requests if r is not leader)
        leader.sequence.reserved_seqs = 1 + sum(len(r.targets) > 1 for r in leader.followers)
        self._add(leader)
        for request in leader.followers:
            self.active.admit(request)
        return requests

    @staticmethod
    def _whole(prompt: list[int], kind: str, priority: int) -> Sequence:
        return Sequence(list(prompt), len(prompt), priority=priority, output_kind=kind)

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
        search = BeamSearch(beams, prompt, n_ends)
        n_offers = min(search.n_offers, self.runner.config.vocab_size)
        plain = self._new(prompt, params, 0, priority)
        # Of the model itself where nothing changes its distribution: that is the same, and costs less.
        changes = bool(len(plain.metadata.edits)) or params.penalizes or plain.is_guided
        params = dataclasses.replace(params, logprobs=n_offers, logprobs_of="sampling" if changes else "model")
        metadata = SamplingMetadata(params, 0, plain.metadata.edits)
        root = Hypothesis(plain.sequence, params, 0, plain.output, metadata, search=search, owner=search)
        search.start(root)
        self._add(root)
        return search

    def _add(self, request: _R) -> _R:
        self.scheduler.add(request.sequence)
        self.active.admit(request)
        return request

    def fork(
        self,
        request: Request,
        *,
        length: int | None = None,
        params: SamplingParams | None = None,
        seed: int | None = None,
    ) -> Generation:
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
        if not isinstance(request, Generation) or (params is not None and params.n_samples != 1):
            raise InvalidRequestError("only requests that generate can be forked, into one more each time")
        if params is None:
            params = dataclasses.replace(request.params, n=1, best_of=None)
        tokens = self._beginning(request, length)
        child = self._new(tokens[: request.n_prompt], params, request.seed if seed is None else seed, 0)
        child.sequence.tokens, child.sequence.priority = tokens, request.sequence.priority
        child.output.replay(request.output.chunks[: len(tokens) - request.n_prompt])
        self.scheduler.fork(request.sequence, child.sequence)
        self.active.admit(child)
        return child

    def rewind(self, request: Request, length: int) -> None:
        """Take a request back to when it had `length` tokens, prompt included, and let it go on from there.

        It draws the same tokens again, since draws depend on seed and position; `fork` goes on otherwise. Recurrent
        layers go back to their last checkpoint and compute what lies between again. A request that is done comes
        back. Nothing happens at its own length.

        Raises:
            InvalidRequestError: shorter than the prompt, longer than the request, or it does not generate; nothing
                was changed.
        """
        if not isinstance(request, Generation):
            raise InvalidRequestError("only requests that generate can be rewound: this one generates nothing")
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
            self.active.admit(request)

    @staticmethod
    def _beginning(request: Generation, length: int | None) -> list[int]:
        tokens = request.sequence.tokens
        length = len(tokens) if length is None else length
        if not request.n_prompt <= length <= len(tokens):
            raise InvalidRequestError(
                f"a length of {length}, for a request with {request.n_prompt} tokens of prompt and {len(tokens)} in all"
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
        chosen = [r for r in (self.active.by_sequence.values() if requests is None else requests) if not r.done]
        if any(
            isinstance(r, BeamSearch | Hypothesis) or r.sequence.output_kind not in (None, "logits") for r in chosen
        ):
            raise SnapshotError(
                "hidden states, scores and beams have no place in snapshots: let their requests finish first"
            )
        chosen.sort(key=lambda r: order.get(r.sequence, len(order)))
        entries = [
            Entry(r.sequence, None, 0, None, None, r.rows)
            if isinstance(r, Capture)
            else Entry(r.sequence, r.params, r.seed, r.output, r.metadata, [])
            for r in chosen
        ]
        return encode(self._host, entries, [self._saved(r.sequence) for r in chosen])

    def _saved(self, sequence: Sequence) -> Any:
        return self.pool.export(sequence.state) if sequence.n_computed else sequence.swapped

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
        entries = decode(self._host, blob, self.scheduler.check)
        return [
            self._add(Capture(e.sequence, e.logits))
            if e.params is None
            else self._add(Generation(e.sequence, e.params, e.seed, e.output, e.metadata))
            for e in entries
        ]

    @cached_property
    def _host(self) -> Host:
        """Fingerprint and state layout that snapshots are checked against; reads all parameters once."""
        config, state = self.runner.config, self.runner.state
        fingerprint = model_fingerprint(config, self.runner.params)
        return Host(fingerprint, config.vocab_size, self.tokenizer, self._matcher, *state_specs(state))

    def cancel(self, request: Request) -> None:
        """Drop a request or a beam search, in any state; its pages are free at once.

        Nothing happens to one that is done. Other samples of its prompt go on.
        """
        self._drop(request)
        self.active.notify()

    def cancel_all(self, requests: Iterable[Request]) -> None:
        """Cancel requests with all their parts; their waiters are not called."""
        requests = list(requests)
        for request in requests:
            request.on_done = None
        for request in requests:
            for part in request.parts:
                self._drop(part)
        self.active.notify()

    def _drop(self, request: Request) -> None:
        if request.done:
            return
        if isinstance(request, BeamSearch):
            request.cancel(self.active)
        else:
            self.active.leave(request, "cancelled")
