"""What a request has produced so far: tokens, their log-probabilities, and text that never splits a character."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from oxjax.errors import InvalidRequestError
from oxjax.sampling.params import SamplingParams
from oxjax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Chunk:
    """One generated token.

    Attributes:
        token_id: its id.
        logprob: its log-probability under the raw distribution.
        top_logprobs: (id, log-probability) of the chosen token, then of the `params.logprobs` most likely ones
            where they are not the chosen one; empty unless asked for.
        text: the text that became certain with it; may be empty, or more than the token's own.
        finish_reason: None, or why this is the last one: "stop" (an end-of-generation token, a stop token or a stop
            text), "length" (`max_tokens`) or "context" (no room is left).
        stop_reason: the stop text, or the id of the stop token, that ended it; None for anything else.
    """

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]
    text: str
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Output:
    """Turns a request's tokens into chunks.

    Args:
        tokenizer: the model's.
        prompt: its ids, which the text continues.
        params: stop texts and limits.
        max_new: tokens that there is room for.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], params: SamplingParams, max_new: int):
        self.tokenizer, self.params, self.max_new = tokenizer, params, max_new
        self.chunks: list[Chunk] = []
        self._detokenizer = tokenizer.detokenizer(skip_special=True)
        for token in prompt:
            self._detokenizer.push(token)
        self._held = ""  # text that may turn out to be the beginning of a stop text

    def replay(self, chunks: Iterable[Chunk]) -> Output:
        """Take tokens that were generated before, and return this output.

        Raises:
            InvalidRequestError: they already end it.
        """
        for chunk in chunks:
            again = self.push(chunk.token_id, chunk.logprob, chunk.top_logprobs)
            if again.finish_reason is not None:
                raise InvalidRequestError(
                    f"it is done after {len(self.chunks)} of these tokens: {again.finish_reason!r}"
                )
        return self

    def push(self, token: int, logprob: float, top: tuple[tuple[int, float], ...]) -> Chunk:
        """Take the next token; the chunk says whether it was the last."""
        params, n_new = self.params, len(self.chunks) + 1
        cause: str | int | None = token if token in params.stop_token_ids else None
        at_end = cause is not None or (token in self.tokenizer.eog_ids and not params.ignore_eos)
        reason = "stop" if at_end else None
        text = self._held + ("" if at_end else self._detokenizer.push(token))
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
        self.chunks.append(Chunk(token, logprob, top, text[: len(text) - keep], reason, cause))
        return self.chunks[-1]

    def _may_begin_stop(self, text: str) -> int:
        """How many last characters could still grow into a stop text."""
        most = max(len(s) for s in self.params.stop) - 1
        lengths = range(min(most, len(text)), 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self.params.stop)), 0)
