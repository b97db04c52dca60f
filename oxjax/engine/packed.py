"""What the host tells the device, as one array of int32: a transfer costs more than what is in it.

A row is a record of 32-bit fields. NumPy's structured types say on both sides where each of them lies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import numpy as np
from jax import lax
from jaxtyping import Array, Int

# What choosing a row's next token needs, as `SamplingRows` has it.
SAMPLING = np.dtype(
    [
        ("seeds", np.uint32, (2,)),
        ("positions", np.int32),
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("min_p", np.float32),
    ]
)

# What a sequence that decodes needs, as `DecodeRows` has it. Its block table follows.
DECODING = np.dtype(
    [
        ("sampling", SAMPLING),
        ("tokens", np.int32),
        ("n_steps", np.int32),
        ("heeds_ends", np.int32),
        ("ends_call", np.int32),
        ("read_slots", np.int32),
        ("write_slots", np.int32),
    ]
)


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
