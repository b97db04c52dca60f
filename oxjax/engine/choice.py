"""How a request chooses its tokens, packed once: most of it is the same at every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt32

from oxjax.engine.config import MAX_STEPS
from oxjax.engine.packed import STAGE_PARAMETERS, Room, sampling_record, sizes
from oxjax.sampling.edits import ALWAYS, EDIT, LEAST_EDITS
from oxjax.sampling.params import ALL_STAGES, SamplingParams
from oxjax.sampling.penalties import LEAST_RECENT, recent_tokens

_ALL = 2**31 - 1  # tokens of a window without an end


class Moment(NamedTuple):
    """What changes from one token of a request to the next.

    Attributes:
        tokens: so far, prompt included.
        mu: of mirostat.
        repeating: what is subtracted from the logits of tokens that would repeat what was said.
        mask: the tokens that may follow, uint32 `[words]` as `sample` takes it; None for all.
    """

    tokens: list[int]
    mu: float = 0.0
    repeating: Sequence[tuple[int, float]] = ()
    mask: UInt32[np.ndarray, " words"] | None = None


class Choice:
    """What does not change from one token of a request to the next.

    Args:
        params: what it asked for.
        seed: of its draws.
        edits: records of `EDIT`.

    Attributes:
        window: how many of the last tokens matter.
    """

    def __init__(self, params: SamplingParams, seed: int, edits: np.ndarray):
        self.params, self.seed, self.edits = params, seed, edits
        self.window = 0
        if params.penalizes:
            self.window = _ALL if params.penalty_window is None else params.penalty_window
        self._packed: dict[Room, np.ndarray] = {}

    def packed(self, room: Room) -> np.ndarray:
        """A `sampling_record`, but for what a `Moment` says."""
        if room not in self._packed:
            self._packed[room] = self._pack(room)
        return self._packed[room]

    def place(self, records: np.ndarray, i: int, moment: Moment, room: Room) -> None:
        """Write what is missing in row `i` of `sampling_record`s."""
        records["positions"][i] = len(moment.tokens)
        if self.params.mirostat:
            records["mus"][i] = moment.mu
        if moment.mask is not None:
            records["masked"][i] = True
        if self.window:
            records["penalties"]["recent"][i] = recent_tokens(moment.tokens, room.n_recent)
        if moment.repeating:
            ids, penalties = zip(*moment.repeating, strict=True)
            edits, first = records["edits"], len(self.edits)
            here = i, slice(first, first + len(ids))
            edits["ids"][here], edits["until"][here] = ids, ALWAYS
            edits["values"][here], edits["late"][here] = np.negative(penalties), True

    def _pack(self, room: Room) -> np.ndarray:
        record, params = np.zeros((), sampling_record(room)), self.params
        record["seeds"] = self.seed >> 32, self.seed & 0xFFFFFFFF
        for name in EDIT.names:
            record["edits"][name][: len(self.edits)] = self.edits[name]
        penalties = record["penalties"]
        penalties["window"] = self.window
        for name in ("repetition", "frequency", "presence"):
            penalties[name] = getattr(params, f"{name}_penalty")
        stages = record["stages"]
        order = [ALL_STAGES.index(name) for name in params.stages]
        stages["order"][: len(order)], stages["n_stages"] = order, len(order)
        for name, _ in STAGE_PARAMETERS:
            stages[name] = getattr(params, name)
        record["reports_final"] = params.logprobs_of == "sampling"
        return record


def room_for(choices: Iterable[tuple[Choice, Moment]]) -> Room:
    """For all that these choices depend on at these moments, and after as many more tokens as a call may add."""
    n_edits = n_recent = 0
    for choice, moment in choices:
        n_edits = max(n_edits, len(choice.edits) + len(moment.repeating))
        n_recent = max(n_recent, min(choice.window, len(moment.tokens) + MAX_STEPS))
    return Room(sizes(LEAST_EDITS, n_edits)[-1], sizes(LEAST_RECENT, n_recent)[-1])
