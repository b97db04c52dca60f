"""Requests by kind: what each takes from a step, when it is finished, and its result."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from oxjax.engine.output import Output
from oxjax.engine.scheduler import Sequence
from oxjax.errors import NonFiniteLogitsError, RequestError
from oxjax.results import Result, Score, TokenScore, raise_first
from oxjax.sampling.packing import SamplingMetadata
from oxjax.sampling.params import SamplingParams
from oxjax.sampling.sampled import SampledToken


@dataclass(eq=False, kw_only=True)
class Request(ABC):
    """A request in the engine, of any kind.

    Attributes:
        error: why it failed.
        done: it has left the engine.
        owner: the request whose result it is a part of; None for one on its own.
        n_open: parts of its result that are still in the engine, itself included.
        on_done: called once with the request when its last part has left, by whoever ran that step.
        followers: requests that start as forks of this one, once what they share with it is computed.
    """

    error: RequestError | None = None
    done: bool = False
    owner: Request | None = None
    n_open: int = 0
    on_done: Callable[[Any], None] | None = None
    followers: tuple[Any, ...] = ()

    @property
    def parts(self) -> tuple[Request, ...]:
        """The requests whose end its result waits for, itself first."""
        return (self,)

    @abstractmethod
    def result(self) -> Any:
        """The finished request's result.

        Raises:
            RequestError: it failed, or a part of it.
        """


@dataclass(eq=False)
class Generation(Request):
    """A prompt that is continued.

    Attributes:
        sequence: its tokens and state.
        params: its sampling parameters.
        seed: seed of its draws.
        output: generated tokens and text.
        metadata: its sampling parameters, packed for the device.
        samples: further samples of the same prompt (`params.n`), which are requests as well.
        prompt_scores: the request that scores its prompt, with `params.prompt_logprobs`.
    """

    sequence: Sequence
    params: SamplingParams
    seed: int
    output: Output
    metadata: SamplingMetadata
    samples: tuple[Generation, ...] = ()
    prompt_scores: Scoring | None = None

    @property
    def parts(self) -> tuple[Request, ...]:
        """Itself, its samples, and the scores of its prompt."""
        return self, *self.samples, *(() if self.prompt_scores is None else (self.prompt_scores,))

    @property
    def needs_rows(self) -> bool:
        """There are rows to compute after those that it shares with its leader."""
        return True

    @property
    def n_prompt(self) -> int:
        """Number of prompt tokens."""
        return len(self.sequence.tokens) - len(self.output.chunks)

    @property
    def is_guided(self) -> bool:
        """The host takes part in sampling every token, so that steps cannot run ahead."""
        return self.output.is_guided

    def accept(self, sampled: SampledToken) -> bool:
        """Append a sampled token; returns whether the request is finished, with `error` set if it failed."""
        tokens, n_top = self.sequence.tokens, self.params.logprobs
        if self.error is None:
            self.error = sampled.error(len(tokens))
        if self.error is not None:
            return True
        rank, mu = sampled.rank if n_top else None, sampled.mu if self.params.mirostat else None
        try:
            chunk = self.output.push(sampled.token, sampled.logprob, sampled.pairs(n_top), rank, mu)
        except RequestError as error:
            self.error = error
            return True
        tokens.append(sampled.token)
        return chunk.finish_reason is not None

    def result(self) -> Result:
        """The `Result`; with `best_of`, samples are sorted by mean log-probability. Errors as in `Request`."""
        raise_first(part.error for part in self.parts)
        prompt = self.sequence.tokens[: self.n_prompt]
        results = [result_of_output(prompt, r.output, r.seed) for r in (self, *self.samples)]
        if self.params.best_of is not None:
            results = sorted(results, key=lambda r: -sum(r.logprobs) / len(r.logprobs))[: self.params.n]
        first, *others = results
        scores = None
        if self.params.prompt_logprobs is not None:
            scores = [None, *([] if self.prompt_scores is None else self.prompt_scores.token_scores())]
        return dataclasses.replace(first, prompt_logprobs=scores, others=tuple(others))


@dataclass(eq=False)
class Scoring(Request):
    """A continuation whose tokens' log-probabilities are wanted.

    Attributes:
        sequence: context and continuation, but for the last token.
        targets: tokens of the continuation.
        n_top: number of most likely tokens to report at each position.
        rows: records of `score_records`, as far as they are computed.
    """

    sequence: Sequence
    targets: Seq[int]
    n_top: int = 0
    rows: list[np.ndarray] = field(default_factory=list)

    @property
    def needs_rows(self) -> bool:
        """There are rows to compute after those that it shares with its leader."""
        return len(self.targets) > 1

    def accept(self, records: np.ndarray) -> bool:
        """Take the next scores; returns whether all are there."""
        self.rows.append(records)
        self.sequence.next_output_row += len(records)
        return sum(map(len, self.rows)) == len(self.targets)

    def result(self) -> Score:
        """The `Score` of all tokens.

        Raises:
            NonFiniteLogitsError: logits hold NaN or infinity.
        """
        found = self._finite()
        logprobs, ranks = found["logprobs"].tolist(), found["ranks"].tolist()
        return Score(math.fsum(logprobs), all(rank == 1 for rank in ranks), list(self.targets), logprobs, ranks)

    def token_scores(self) -> list[TokenScore]:
        """The score of each token; errors as for `result`."""
        found = self._finite()
        columns = (found[name].tolist() for name in ("logprobs", "ranks", "top_tokens", "top_logprobs"))
        scores = []
        for token, logprob, rank, *top in zip(self.targets, *columns, strict=True):
            others = [pair for pair in zip(*top, strict=True) if pair[0] != token]
            scores.append(TokenScore(token, logprob, rank, ((token, logprob), *others)))
        return scores

    def _finite(self) -> np.ndarray:
        raise_first([self.error])
        found = np.concatenate(self.rows)
        if not found["finite"].all():
            at = len(self.sequence.tokens) - len(self.targets) + int(np.argmin(found["finite"])) + 1
            raise NonFiniteLogitsError(f"the logits for position {at} hold NaN or infinity")
        return found


@dataclass(eq=False)
class Capture(Request):
    """A prompt whose logits or hidden states are wanted at every position (`sequence.output_kind`).

    Attributes:
        sequence: the prompt and its state.
        rows: float32 logits `[n, vocab]` or hidden states `[n, d_model]`, as far as they are computed.
    """

    sequence: Sequence
    rows: list[np.ndarray] = field(default_factory=list)

    def accept(self, rows: np.ndarray) -> bool:
        """Take the next rows; returns whether all are there."""
        self.rows.append(rows)
        self.sequence.next_output_row += len(rows)
        return self.sequence.next_output_row == len(self.sequence.tokens)

    def result(self) -> np.ndarray:
        """All rows: float32 `[T, vocab]` or `[T, d_model]`."""
        raise_first([self.error])
        return np.concatenate(self.rows)


def result_of_output(prompt: list[int], output: Output, seed: int) -> Result:
    """The `Result` of one finished output."""
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


def score_records(columns: Mapping[str, np.ndarray], rows: slice, n_top: int) -> np.ndarray:
    """A request's scores as records, one per token; for the fields see `Runner.score`.

    Args:
        columns: everything that was scored in a step.
        rows: those of the request.
        n_top: number of most likely tokens to keep.
    """
    fields = {name: column[rows, :n_top] if column.ndim > 1 else column[rows] for name, column in columns.items()}
    kind = [(name, column.dtype, column.shape[1:]) for name, column in fields.items()]
    records = np.empty(len(fields["ranks"]), kind)
    for name, column in fields.items():
        records[name] = column
    return records


def outcome(request: Request | RequestError) -> Any:
    """The result of a finished request, or the error that it ended with."""
    if isinstance(request, RequestError):
        return request
    try:
        return request.result()
    except RequestError as error:
        return error


def reporter(
    on_result: Callable[[int, Any], None] | None, places: Mapping[Any, int]
) -> Callable[[Request], None] | None:
    """An `on_done` of `Engine.run` that reports results with their places; those of failed requests are left out."""
    if on_result is None:
        return None

    def report(request: Request) -> None:
        result = outcome(request)
        if not isinstance(result, RequestError):
            on_result(places[request], result)

    return report


def results_or_raise(requests: Iterable[Request | RequestError]) -> list[Any]:
    """The results of finished requests, in order.

    Raises:
        RequestError: the first error among them; its `index` says whose, its `results` hold those of the others.
    """
    return or_raise([outcome(request) for request in requests])


def or_raise(found: list[Any]) -> list[Any]:
    """Values, or the first error among them with the others; see `results_or_raise`."""
    values = tuple(None if isinstance(value, RequestError) else value for value in found)
    for i, error in enumerate(found):
        if isinstance(error, RequestError):
            error.index, error.results = i, values
            raise error
    return found
