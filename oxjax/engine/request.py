"""A request while the engine has it, and what it has given when it is done."""

from __future__ import annotations

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
        logits: float32 rows `[n, vocab]` so far, for a prompt whose logits are wanted, or `[n, d_model]`.
        samples: the other samples of the same prompt, where `params.n` asked for several: requests as well.
        unborn: those of them that wait for the prompt to be computed, to begin as forks of this one.
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
    logits: list[np.ndarray] = field(default_factory=list)
    samples: tuple[Request, ...] = ()
    unborn: tuple[Request, ...] = ()
    search: BeamSearch | None = None
    total: float = 0.0
    offers: list[tuple[int, float]] | None = None
    error: RequestError | None = None
    done: bool = False

    @property
    def is_guided(self) -> bool:
        """Whether the host has a say in every token."""
        return self.search is not None or self.output.is_guided

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.sequence.tokens) - (0 if self.output is None else len(self.output.chunks))
