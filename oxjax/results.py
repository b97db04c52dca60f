"""What requests have given, for people."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from oxjax.engine.beams import BeamSearch
from oxjax.engine.output import Output
from oxjax.engine.request import Request
from oxjax.errors import NonFiniteLogitsError, RequestError


@dataclass(frozen=True)
class TokenScore:
    """How likely a token of a prompt is after those before it.

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
    """How likely a continuation is after its context.

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
    """How well a model predicts a text.

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
    """What one prompt gave.

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


def result_of(request: Request) -> Result:
    """What a request that is done has given, the best of its samples first if it drew more than it was to give."""
    prompt = request.sequence.tokens[: request.n_prompt]
    results = [_result(prompt, r.output, r.seed) for r in (request, *request.samples)]
    if request.params.best_of is not None:
        results = sorted(results, key=lambda r: -sum(r.logprobs) / len(r.logprobs))[: request.params.n]
    first, *others = results
    scores = None
    if request.params.prompt_logprobs is not None:
        scores = [None, *([] if request.scored is None else scores_of(request.scored))]
    return dataclasses.replace(first, prompt_logprobs=scores, others=tuple(others))


def scores_of(request: Request) -> list[TokenScore]:
    """What a request that scores tokens has found, for each of them; errors as for `score_of`."""
    found = _finite(request)
    columns = (found[name].tolist() for name in ("logprobs", "ranks", "top_tokens", "top_logprobs"))
    scores = []
    for token, logprob, rank, *top in zip(request.targets, *columns, strict=True):
        others = [pair for pair in zip(*top, strict=True) if pair[0] != token]
        scores.append(TokenScore(token, logprob, rank, ((token, logprob), *others)))
    return scores


def score_of(request: Request) -> Score:
    """What a request that scores tokens has found, for all of them.

    Raises:
        NonFiniteLogitsError: there were logits that are not.
    """
    found = _finite(request)
    logprobs, ranks = found["logprobs"].tolist(), found["ranks"].tolist()
    return Score(math.fsum(logprobs), all(rank == 1 for rank in ranks), list(request.targets), logprobs, ranks)


def _finite(request: Request) -> np.ndarray:
    found = np.concatenate(request.rows)
    if not found["finite"].all():
        at = len(request.sequence.tokens) - len(request.targets) + int(np.argmin(found["finite"])) + 1
        raise NonFiniteLogitsError(f"the logits for position {at} hold NaN or infinity")
    return found


def beams_of(search: BeamSearch) -> list[Result]:
    """The texts that a beam search has found, the best first."""
    return [dataclasses.replace(_result(search.prompt, b.output, 0), score=b.score) for b in search.found]


def _result(prompt: list[int], output: Output, seed: int) -> Result:
    chunks, reports = output.chunks, output.params.logprobs > 0
    return Result(
        prompt_token_ids=list(prompt),
        token_ids=[c.token_id for c in chunks],
        text="".join(c.text for c in chunks),
        logprobs=[c.logprob for c in chunks],
        top_logprobs=[c.top_logprobs for c in chunks] if reports else None,
        finish_reason=chunks[-1].finish_reason,
        seed=seed,
        stop_reason=chunks[-1].stop_reason,
        ranks=[c.rank for c in chunks] if reports else None,
    )


def all_or_raise(requests: Iterable[Request | BeamSearch | RequestError], value: Callable[[Any], Any]) -> list[Any]:
    """The value of every request, or the first error with the values of the others."""
    found: list[Any] = []
    for r in requests:
        error = r if isinstance(r, RequestError) else next((part.error for part in r.parts if part.error), None)
        try:
            found.append(value(r) if error is None else error)
        except RequestError as late:
            found.append(late)
    return or_raise(found)


def or_raise(found: list[Any]) -> list[Any]:
    """These values, or the first error among them with the others."""
    values = tuple(None if isinstance(value, RequestError) else value for value in found)
    for i, error in enumerate(found):
        if isinstance(error, RequestError):
            error.index, error.results = i, values
            raise error
    return found
