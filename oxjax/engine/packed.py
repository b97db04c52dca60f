"""What the host tells the device, as one array of int32: a transfer costs more than what is in it.

A row is a record of 32-bit fields. NumPy's structured types say on both sides where each of them lies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from jax import lax
from jaxtyping import Array, Int

from oxjax.sampling.edits import EDIT, LEAST_EDITS, Edits
from oxjax.sampling.params import ALL_STAGES
from oxjax.sampling.penalties import LEAST_RECENT, Penalties
from oxjax.sampling.pipeline import SamplingRows
from oxjax.sampling.stages import Stages

_WHOLE = "top_k", "mirostat"
_REALS = [name for name in Stages.__dataclass_fields__ if name not in ("order", "n_stages", *_WHOLE)]
STAGE_PARAMETERS = [*((name, np.int32) for name in _WHOLE), *((name, np.float32) for name in _REALS)]


class Room(NamedTuple):
    """How much of what varies a record has room for.

    Attributes:
        n_edits: single logits that are changed.
        n_recent: last tokens.
    """

    n_edits: int = LEAST_EDITS
    n_recent: int = LEAST_RECENT

    def __str__(self) -> str:
        return f"{self.n_edits} edits, {self.n_recent} recent tokens"


def sizes(least: int, most: int) -> list[int]:
    """All sizes that programs are compiled for, where up to so many of something are needed."""
    found = [least]
    while found[-1] < most:
        found.append(found[-1] * 16)
    return found


@cache
def sampling_record(room: Room) -> np.dtype:
    """What choosing a row's next token needs, as `SamplingRows` has it."""
    penalties = [("window", np.int32), *((name, np.float32) for name in ("repetition", "frequency", "presence"))]
    return np.dtype(
        [
            ("seeds", np.uint32, (2,)),
            ("positions", np.int32),
            ("edits", [(name, EDIT[name], (room.n_edits,)) for name in EDIT.names]),
            ("penalties", [*penalties, ("recent", np.int32, (room.n_recent,))]),
            ("stages", [("order", np.int32, (len(ALL_STAGES),)), ("n_stages", np.int32), *STAGE_PARAMETERS]),
            ("mus", np.float32),
            ("masked", np.int32),
            ("reports_final", np.int32),
        ]
    )


@cache
def decoding_record(room: Room) -> np.dtype:
    """What a sequence that decodes needs, as `DecodeRows` has it. Its block table follows."""
    return np.dtype(
        [
            ("sampling", sampling_record(room)),
            ("tokens", np.int32),
            ("n_steps", np.int32),
            ("heeds_ends", np.int32),
            ("ends_call", np.int32),
            ("read_slots", np.int32),
            ("write_slots", np.int32),
        ]
    )


def sampling_rows(fields: dict[str, Any]) -> SamplingRows:
    """The unpacked fields of a `sampling_record`."""
    parts = {"edits": Edits, "penalties": Penalties, "stages": Stages}
    return SamplingRows(**{**fields, **{name: part(**fields[name]) for name, part in parts.items()}})


def n_words(record: np.dtype) -> int:
    """Numbers that a record takes."""
    return record.itemsize // 4


def unpack(packed: Int[Array, "n words"], record: np.dtype) -> dict[str, Any]:
    """The fields of records: arrays `[n, ...]`, or dicts of them where a field is a record; for traced arrays."""
    fields: dict[str, Any] = {}
    for name, (kind, offset, *_) in record.fields.items():
        words = packed[:, offset // 4 : (offset + kind.itemsize) // 4]
        if kind.names:
            fields[name] = unpack(words, kind)
        else:
            words = words.reshape(len(packed), *kind.shape)
            fields[name] = lax.bitcast_convert_type(words, kind.base)
    return fields


def n_numbers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Numbers that arrays of these shapes have together."""
    return sum(map(math.prod, shapes.values()))


def split(flat: Int[Any, " n"], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Arrays of these shapes, one after the other in `flat`: views of NumPy's, or parts of traced ones."""
    ends = accumulate(map(math.prod, shapes.values()))
    return {n: flat[end - math.prod(s) : end].reshape(s) for (n, s), end in zip(shapes.items(), ends, strict=True)}
