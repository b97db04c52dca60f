"""Generated tokens of a request, their log-probabilities, and their text, which never splits a character."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

from oxjax.constrain.matcher import Matcher
from oxjax.errors import InvalidRequestError
from oxjax.sampling.dry import Dry
from oxjax.sampling.packing import SamplingInputs
from oxjax.sampling.params import SamplingParams
from oxjax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Chunk:
    """One generated token.

    Attributes:
        token_id: its id.
        logprob: its log-probability, of the distribution that `params.logprobs_of` names.
        top_logprobs: (id, log-probability) of the chosen token, then of the `params.logprobs` most likely ones
            where they are not the chosen one and could have been chosen; empty unless asked for.
        text: the text that became certain with it; may be empty, or more than the token's own.
        finish_reason: None, or why this is the last one: "stop" (an end-of-generation token, a stop token or a stop
            text), "length" (`max_tokens`) or "context" (no room is left).
        stop_reason: the stop text, or the id of the stop token, that ended it; None for anything else.
        rank: the token's place in that distribution, from 1; None unless log-probabilities were asked for.
        mu: what mirostat has come to with it, in bits; None without mirostat.
    """

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]
    text: str
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    rank: int | None = None
    mu: float | None = None


class Output:
    """Turns a request's tokens into chunks.

    Args:
        tokenizer: the model's.
        prompt: its ids, which the text continues.
        params: stop texts and limits.
        max_new: tokens that there is room for.
        matcher: of `params.grammar`, at its beginning.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: list[int],
        params: SamplingParams,
        max_new: int,
        matcher: Matcher | None = None,
    ):
        self.tokenizer, self.params, self.max_new = tokenizer, params, max_new
        self._matcher = matcher
        self.chunks: list[Chunk] = []
        self._detokenizer = tokenizer.detokenizer(skip_special=True)
        self._dry = Dry(params, tokenizer.token_bytes) if params.dry_multiplier else None
        for token in prompt:
            self._detokenizer.push(token)
            self._remember(token)
        self._held = ""  # text that may turn out to be the beginning of a stop text

    def replay(self, chunks: Iterable[Chunk]) -> Output:
        """Take tokens that were generated before, and return this output.

        Raises:
            InvalidRequestError: they already end it, or are not what its grammar allows.
        """
        for chunk in chunks:
            again = self.push(chunk.token_id, chunk.logprob, chunk.top_logprobs, chunk.rank, chunk.mu)
            if again.finish_reason is not None:
                raise InvalidRequestError(
                    f"it is done after {len(self.chunks)} of these tokens: {again.finish_reason!r}"
                )
        return self

    def copy(self) -> Output:
        """Another output that has had the same tokens."""
        other = copy.copy(self)
        other.chunks, other._detokenizer = self.chunks.copy(), self._detokenizer.copy()
        other._dry, other._matcher = copy.copy(self._dry), self._matcher and self._matcher.copy()
        return other

    @property
    def is_guided(self) -> bool:
        """The host takes part in sampling every token."""
        return self._dry is not None or self._matcher is not None

    def sampling_inputs(self, tokens: list[int]) -> SamplingInputs:
        """Inputs that the next token is sampled with.

        Args:
            tokens: so far, prompt included.

        Raises:
            GrammarStuckError: see `Matcher.mask`.
        """
        repeating = [] if self._dry is None else self._dry.penalties(tokens)
        mu = self.chunks[-1].mu if self.chunks else None
        mask = None if self._matcher is None else self._matcher.mask()
        return SamplingInputs(tokens, self.params.initial_mu if mu is None else mu, repeating, mask)

    def _remember(self, token: int) -> None:
        if self._dry is not None:
            self._dry.push(token)

    def push(
        self,
        token: int,
        logprob: float,
        top: tuple[tuple[int, float], ...],
        rank: int | None = None,
        mu: float | None = None,
    ) -> Chunk:
        """Take the next token; the chunk says whether it was the last. For the arguments see there.

        Raises:
            GrammarError: the grammar does not allow it here.
            GrammarStuckError: see `Matcher.advance`.
        """
        if self._matcher is not None:
            self._matcher.advance(token)
        self._remember(token)
        params, n_new = self.params, len(self.chunks) + 1
        cause: str | int | None = token if token in params.stop_token_ids else None
        at_end = cause is not None or (token in self.tokenizer.eog_ids and not params.ignore_eos)
        reason = "stop" if at_end else None
        text = self._held + ("" if at_end else self._detokenizer.push(token))
        if self._matcher is not None and not self.tokenizer.eog_ids and self._matcher.is_done:
            reason = "stop"  # this vocabulary has no token for it
        if reason is None and n_new == self.max_new:
            reason = "length" if self.max_new == params.max_tokens else "context"
        if reason is not None:
            text += self._detokenizer.flush()
        keep = 0
        if params.stop:
            found = [(i, s) for s in params.stop if (i := text.find(s)) >= 0] if n_new >= params.min_tokens else []
            if found:
                at, cause = min(found, key=lambda f: f[0])
                text, reason = text[:at], "stop"
            keep = 0 if reason is not None else self._may_begin_stop(text)
        self._held = text[len(text) - keep :]
        self.chunks.append(Chunk(token, logprob, top, text[: len(text) - keep], reason, cause, rank, mu))
        return self.chunks[-1]

    def _may_begin_stop(self, text: str) -> int:
        """Number of last characters that could still grow into a stop text."""
        most = max(len(s) for s in self.params.stop) - 1
        lengths = range(min(most, len(text)), 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self.params.stop)), 0)
