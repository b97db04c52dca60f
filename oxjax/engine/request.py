"""A request while the engine has it, and what it has given when it is done."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from oxjax.engine.choice import Choice
from oxjax.engine.output import Output
from oxjax.engine.scheduler import Sequence
from oxjax.errors import RequestError
from oxjax.sampling.params import SamplingParams

if TYPE_CHECKING:
    from oxjax.engine.beams import BeamSearch


@dataclass(eq=False)
class Request:
    """A request in the engine.

    Attributes:
        sequence: its tokens and state.
        params: how it is sampled; None for a prompt whose logits or hidden states are wanted.
        seed: of its draws.
        output: what it has generated.
        choice: how it chooses its tokens, as the device is told.
        rows: what is wanted of its rows, as far as it is there: float32 logits `[n, vocab]`, float32 hidden states
            `[n, d_model]`, or records of scores `[n]`; see `score_records`.
        targets: the tokens to score, the last of which is not among those of the sequence.
        n_top: how many of the most likely tokens its scores report.
        scored: the request that scores its prompt, where `params.prompt_logprobs` asked.
        samples: the other samples of the same prompt, where `params.n` asked for several: requests as well.
        unborn: requests that wait for the beginning that they share with this one, to begin as forks of it: samples,
            or other targets after the same context.
        search: the beam search that it computes a beginning of, if it does.
        total: of the log-probabilities of that beginning.
        offers: the most likely next tokens of it, and their log-probabilities; None until they are known.
        error: why it failed.
        done: whether it has left the engine.
    """

    sequence: Sequence
    params: SamplingParams | None = None
    seed: int = 0
    output: Output | None = None
    choice: Choice | None = None
    rows: list[np.ndarray] = field(default_factory=list)
    targets: Seq[int] = ()
    n_top: int = 0
    scored: Request | None = None
    samples: tuple[Request, ...] = ()
    unborn: tuple[Request, ...] = ()
    search: BeamSearch | None = None
    total: float = 0.0
    offers: list[tuple[int, float]] | None = None
    error: RequestError | None = None
    done: bool = False

    @property
    def parts(self) -> tuple[Request, ...]:
        """What has to be done before its result is there: itself, its samples, and the scores of its prompt."""
        return self, *self.samples, *(() if self.scored is None else (self.scored,))

    @property
    def is_guided(self) -> bool:
        """Whether the host has a say in every token."""
        return self.search is not None or self.output.is_guided

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.sequence.tokens) - (0 if self.output is None else len(self.output.chunks))


def score_records(columns: Mapping[str, np.ndarray], rows: slice, n_top: int) -> np.ndarray:
    """How likely tokens are after those before them; for the fields see `Runner.score`.

    Args:
        columns: of all that was scored in a step.
        rows: those of the request.
        n_top: how many of the most likely tokens.
    """
    fields = {name: column[rows, :n_top] if column.ndim > 1 else column[rows] for name, column in columns.items()}
    kind = [(name, column.dtype, column.shape[1:]) for name, column in fields.items()]
    records = np.empty(len(fields["ranks"]), kind)
    for name, column in fields.items():
        records[name] = column
    return records
