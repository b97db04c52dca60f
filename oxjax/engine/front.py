"""What can be asked of an engine: requests of all kinds, their forks, their ends, and snapshots."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from oxjax.cache.states import StatePool
from oxjax.constrain.matcher import GrammarCompiler, Matcher
from oxjax.engine.beams import BeamParams, BeamSearch
from oxjax.engine.choice import Choice
from oxjax.engine.output import Output
from oxjax.engine.request import Request
from oxjax.engine.runner import Runner
from oxjax.engine.scheduler import Scheduler, Sequence
from oxjax.engine.snapshot import Entry, Host, decode, encode, model_fingerprint, state_specs
from oxjax.errors import InvalidRequestError, SnapshotError
from oxjax.sampling.edits import edits_of
from oxjax.sampling.params import SamplingParams, sample_seed
from oxjax.tokenizer import Tokenizer


class Front:
    """The part of `Engine` that takes requests in, and lets them go.

    Attributes:
        runner, tokenizer, pool, scheduler: the engine's.
    """

    runner: Runner
    tokenizer: Tokenizer
    pool: StatePool
    scheduler: Scheduler
    _requests: dict[Sequence, Request]
    _counts: Counter[str]

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
        if params.prompt_logprobs is not None and len(prompt) > 1:  # first, so that the others find the prompt's state
            (leader.scored,) = self.score(prompt[:1], [prompt[1:]], params.prompt_logprobs, priority=priority)
        leader.samples = leader.unborn = tuple(others)
        leader.sequence.places = len(requests)
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

    def score(
        self, context: list[int], continuations: Iterable[list[int]], n_top: int = 0, *, priority: int = 0
    ) -> list[Request]:
        """Queue continuations of a context of which is wanted how likely each token is after those before it.

        The context is computed once, and its last row says how likely each first token is. Records of `score_records`
        come into `Request.rows`, one for each token. At no time are there logits of more than some rows.

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
            sequence.first, sequence.pause = len(context) - 1, len(context) if len(continuations) > 1 else 0
            self.scheduler.check(sequence)
            requests.append(Request(sequence, targets=tuple(targets), n_top=n_top))
        leader = max(requests, key=lambda r: len(r.targets))
        leader.unborn = tuple(r for r in requests if r is not leader)
        leader.sequence.places = 1 + sum(len(r.targets) > 1 for r in leader.unborn)
        self._add(leader)
        for request in leader.unborn:
            self._admit(request)
        return requests

    @staticmethod
    def _whole(prompt: list[int], wants: str, priority: int) -> Sequence:
        return Sequence(list(prompt), len(prompt), priority=priority, wants=wants)

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
        if any(r.search or r.sequence.wants not in (None, "logits") for r in chosen):
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

    def cancel(self, request: Request | BeamSearch) -> None:
        """Drop a request or a beam search, whatever its state; its pages are free at once.

        Nothing happens to one that is done. Other samples of its prompt go on.
        """
        if request.done:
            return
        if isinstance(request, BeamSearch):
            request.cancel(self.scheduler, self._requests)
            self._counts["cancelled"] += 1
        else:
            self._leave(request, "cancelled")

    def _leave(self, request: Request, how: str) -> None:
        self.scheduler.remove(request.sequence)
        del self._requests[request.sequence]
        request.done = True
        self._counts[how] += 1
        unborn = [r for r in request.unborn if not r.done]
        request.unborn = ()
        if unborn:  # the first of them computes the prompt instead
            unborn[0].sequence.places = len(unborn)
            self.scheduler.add(unborn[0].sequence)
            unborn[0].unborn = tuple(unborn[1:])
