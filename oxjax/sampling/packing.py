"""Sampling parameters of requests, packed into int32 records that go to the device in one transfer per step.

A row's record holds every field of `SamplingRows`; NumPy's structured types say on both sides where each field lies.
Most of a record is constant over a request (`SamplingMetadata`), the rest depends on the token (`SamplingInputs`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from oxjax.kernels.numerics import Numerics
from oxjax.sampling.edits import ALWAYS, EDIT, LEAST_EDITS, Edits
from oxjax.sampling.params import ALL_STAGES, SamplingParams
from oxjax.sampling.penalties import LEAST_RECENT, Penalties, recent_tokens
from oxjax.sampling.pipeline import Sampled, SamplingRows, sample
from oxjax.sampling.stages import Stages

_INTEGERS = "top_k", "mirostat"
_REALS = [name for name in Stages.__dataclass_fields__ if name not in ("order", "n_stages", *_INTEGERS)]
STAGE_PARAMETERS = [*((name, np.int32) for name in _INTEGERS), *((name, np.float32) for name in _REALS)]
MIN_TOP = 8  # most likely tokens that programs report at least, where any are asked for
_UNBOUNDED = 2**31 - 1  # tokens of a penalty window without an end


class SamplingBucket(NamedTuple):
    """Capacities that a sampling program is compiled for.

    Attributes:
        n_edits: single logits that a row changes.
        n_recent: last tokens that a row's penalties look at.
    """

    n_edits: int = LEAST_EDITS
    n_recent: int = LEAST_RECENT

    def __str__(self) -> str:
        return f"{self.n_edits} edits, {self.n_recent} recent tokens"


class SamplingInputs(NamedTuple):
    """Inputs of sampling that change with every token of a request.

    Attributes:
        tokens: prompt and output so far.
        mu: mirostat's state, in bits.
        dry_penalties: (id, penalty) of tokens that would continue a repetition (DRY).
        mask: tokens that the grammar allows, uint32 `[words]` as `sample` takes it; None allows all.
    """

    tokens: Sequence[int]
    mu: float = 0.0
    dry_penalties: Sequence[tuple[int, float]] = ()
    mask: UInt32[np.ndarray, " words"] | None = None


class SamplingMetadata:
    """Sampling parameters of a request, packed once: they are the same at every step.

    Args:
        params: of the request.
        seed: of its draws.
        edits: records of `EDIT`.

    Attributes:
        window: number of last tokens that its penalties look at.
    """

    def __init__(self, params: SamplingParams, seed: int, edits: np.ndarray):
        self.params, self.seed, self.edits = params, seed, edits
        self.window = 0
        if params.penalizes:
            self.window = _UNBOUNDED if params.penalty_window is None else params.penalty_window
        self._packed: dict[SamplingBucket, np.ndarray] = {}

    def write(self, records: np.ndarray, i: int, inputs: SamplingInputs, bucket: SamplingBucket) -> None:
        """Write row `i` of `sampling_record`s."""
        if bucket not in self._packed:
            self._packed[bucket] = self._pack(bucket)
        records[i] = self._packed[bucket]
        records["positions"][i] = len(inputs.tokens)
        if self.params.mirostat:
            records["mus"][i] = inputs.mu
        if inputs.mask is not None:
            records["masked"][i] = True
        if self.window:
            records["penalties"]["recent"][i] = recent_tokens(inputs.tokens, bucket.n_recent)
        if inputs.dry_penalties:
            ids, penalties = zip(*inputs.dry_penalties, strict=True)
            edits, first = records["edits"], len(self.edits)
            here = i, slice(first, first + len(ids))
            edits["ids"][here], edits["until"][here] = ids, ALWAYS
            edits["values"][here], edits["late"][here] = np.negative(penalties), True

    def _pack(self, bucket: SamplingBucket) -> np.ndarray:
        """A `sampling_record` without the inputs."""
        record, params = np.zeros((), sampling_record(bucket)), self.params
        record["seeds"] = self.seed >> 32, self.seed & 0xFFFFFFFF
        for name in EDIT.fields or ():
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


def bucket_for(rows: Iterable[tuple[SamplingMetadata, SamplingInputs]], n_steps: int = 1) -> SamplingBucket:
    """The smallest bucket that holds these rows, also after `n_steps` tokens more."""
    n_edits = n_recent = 0
    for metadata, inputs in rows:
        n_edits = max(n_edits, len(metadata.edits) + len(inputs.dry_penalties))
        n_recent = max(n_recent, min(metadata.window, len(inputs.tokens) + n_steps))
    return SamplingBucket(bucket_sizes(LEAST_EDITS, n_edits)[-1], bucket_sizes(LEAST_RECENT, n_recent)[-1])


def bucket_sizes(smallest: int, needed: int) -> list[int]:
    """Sizes that programs are compiled for, from the smallest to the first that is at least what is needed."""
    sizes = [smallest]
    while sizes[-1] < needed:
        sizes.append(sizes[-1] * 16)
    return sizes


def top_buckets(n_top: int, vocab_size: int) -> list[int]:
    """Numbers of reported tokens that programs are compiled for, up to the first that is at least `n_top`."""
    sizes = bucket_sizes(MIN_TOP, min(n_top, vocab_size)) if n_top else []
    return [0, *(min(n, vocab_size) for n in sizes)]


def pack_rows(
    n_rows: int, rows: Iterable[tuple[int, SamplingMetadata, SamplingInputs]], bucket: SamplingBucket
) -> Int[np.ndarray, "n_rows words"]:
    """Sampling parameters of rows of logits, as `sample_packed` takes them; rows without any are greedy."""
    record = sampling_record(bucket)
    packed = np.zeros((n_rows, n_words(record)), np.int32)
    records = packed.view(record)[:, 0]
    for row, metadata, inputs in rows:
        metadata.write(records, row, inputs, bucket)
    return packed


@cache
def sampling_record(bucket: SamplingBucket) -> np.dtype:
    """The type of a row's record, whose fields are those of `SamplingRows`."""
    penalties = [("window", np.int32), *((name, np.float32) for name in ("repetition", "frequency", "presence"))]
    return np.dtype(
        [
            ("seeds", np.uint32, (2,)),
            ("positions", np.int32),
            ("edits", [(name, EDIT[name], (bucket.n_edits,)) for name in EDIT.fields or ()]),
            ("penalties", [*penalties, ("recent", np.int32, (bucket.n_recent,))]),
            ("stages", [("order", np.int32, (len(ALL_STAGES),)), ("n_stages", np.int32), *STAGE_PARAMETERS]),
            ("mus", np.float32),
            ("masked", np.int32),
            ("reports_final", np.int32),
        ]
    )


def sampling_rows(fields: dict[str, Any]) -> SamplingRows:
    """The `SamplingRows` of unpacked `sampling_record`s."""
    parts = {"edits": Edits, "penalties": Penalties, "stages": Stages}
    return SamplingRows(**{**fields, **{name: part(**fields[name]) for name, part in parts.items()}})


@partial(jax.jit, static_argnames=("n_top", "bucket", "numerics"))
def sample_packed(
    logits: Float[Array, "N vocab"],
    packed: Int[Array, "N words"],
    masks: UInt32[Array, "N mask_words"],
    *,
    n_top: int,
    bucket: SamplingBucket,
    numerics: Numerics,
) -> Sampled:
    """`sample` with packed parameters, jitted."""
    rows = sampling_rows(unpack(packed, sampling_record(bucket)))
    return sample(logits, rows, masks, n_top=n_top, numerics=numerics)


def n_words(record: np.dtype) -> int:
    """Numbers of 32 bits in a record."""
    return record.itemsize // 4


def unpack(packed: Int[Array, "n words"], record: np.dtype) -> dict[str, Any]:
    """The fields of records as traced arrays `[n, ...]`, or dicts of them where a field is a record."""
    fields: dict[str, Any] = {}
    for name, (kind, offset, *_) in (record.fields or {}).items():
        words = packed[:, offset // 4 : (offset + kind.itemsize) // 4]
        if kind.names:
            fields[name] = unpack(words, kind)
        else:
            words = words.reshape(len(packed), *kind.shape)
            fields[name] = lax.bitcast_convert_type(words, kind.base)
    return fields
