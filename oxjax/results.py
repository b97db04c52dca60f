"""Results of requests, as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from oxjax.errors import RequestError


@dataclass(frozen=True)
class TokenScore:
    """Log-probability of a prompt token, given the tokens before it.

    Attributes:
        token_id: its id.
        logprob: its log-probability.
        rank: its place in the distribution, from 1.
        top_logprobs: (id, log-probability) of the token, then of the most likely ones where they are not it.
    """

    token_id: int
    logprob: float
    rank: int
    top_logprobs: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Score:
    """Log-likelihood of a continuation, given its context.

    Attributes:
        logprob: its log-probability, the sum over its tokens.
        is_greedy: whether each of its tokens is the most likely one, the lowest id among equals.
        token_ids: its tokens.
        token_logprobs: log-probability of each.
        ranks: place of each in the distribution, from 1.
    """

    logprob: float
    is_greedy: bool
    token_ids: list[int]
    token_logprobs: list[float]
    ranks: list[int]


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text, and the log-probabilities that it comes from.

    Attributes:
        perplexity: exp of the mean negative log-probability of a token.
        bits_per_byte: negative log-probability of the text, in bits for each byte of the tokens scored; unlike
            perplexity it compares models with other vocabularies.
        logprob: of the text, the sum over its tokens.
        token_ids: those that were scored: all but the first.
        token_logprobs: log-probability of each.
    """

    perplexity: float
    bits_per_byte: float
    logprob: float
    token_ids: list[int]
    token_logprobs: list[float]


@dataclass(frozen=True)
class Result:
    """The result of one prompt.

    Attributes:
        prompt_token_ids: the prompt as the model saw it, special tokens included.
        token_ids: generated ids; an end-of-generation token is included.
        text: their text, as it continues the prompt; without end-of-generation tokens and stop texts.
        logprobs: log-probability of each generated id; see `SamplingParams.logprobs_of`.
        top_logprobs: for each generated id, (id, log-probability) pairs: the chosen one, then the most likely
            ones that could have been chosen; None unless `SamplingParams.logprobs` asked.
        finish_reason: "stop", "length" or "context"; see `Chunk`.
        stop_reason: the stop text or the id of the stop token that ended it, else None.
        seed: that reproduces this result.
        ranks: the place of each generated id in the same distribution, from 1; None as `top_logprobs`.
        score: of a beam search.
        prompt_logprobs: of each token of the prompt, None for the first; None unless
            `SamplingParams.prompt_logprobs` asked.
        others: further samples of the prompt, where `SamplingParams.n` asked for them.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    logprobs: list[float]
    top_logprobs: list[tuple[tuple[int, float], ...]] | None
    finish_reason: str
    seed: int
    stop_reason: str | int | None = None
    ranks: list[int] | None = None
    score: float | None = None
    prompt_logprobs: list[TokenScore | None] | None = None
    others: tuple[Result, ...] = ()


def raise_first(errors: Iterable[RequestError | None]) -> None:
    """Raise the first error, if there is one."""
    for error in errors:
        if error is not None:
            raise error
