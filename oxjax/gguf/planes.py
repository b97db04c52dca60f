"""Block formats taken apart, without loss, into planes of small integers and the scales of their groups.

A value is `scale * (code - offset) + minimum`. Groups run along a row. In two-level formats 256 values share a
float16 scale (and minimum), which an integer of their group multiplies. Block layouts are those of ggml-common.h.

Formats of fewer bits than four, and those with tables of values, take more memory this way than in the file, though
less than floats. NVFP4 has no planes: its groups of 16 have one level of scales and its files a multiplier beside the
tensor, which no kernel reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gguf.quants import IQ4_NL, MXFP4
from jaxtyping import Float16, Int8, UInt8

from oxjax.gguf.ggml_types import GGMLType, block_layout
from oxjax.gguf.grids import GRIDS, has_half_scales, take_grid_apart

SUPER_BLOCK = 256  # values that share the first level of two


@dataclass(frozen=True)
class PlaneFormat:
    """Plane format: how values are computed from integer codes.

    Attributes:
        bits: of a code: 4, 5, 6 or 8.
        offset: subtracted from a code; a power of two, or 0.
        group: values that share a scale.
        two_level: scales (and minima) are products of a float16 and an int8.
        minima: groups have one.
    """

    bits: int
    offset: int
    group: int = 32
    two_level: bool = False
    minima: bool = False


@dataclass(frozen=True)
class Planes:
    """Rows of values in their parts; `scales` and `minima` are one per group, or one per 256 values in two levels."""

    codes: UInt8[np.ndarray, "n d"]
    scales: Float16[np.ndarray, "n _"]
    minima: Float16[np.ndarray, "n _"] | None = None
    sub_scales: Int8[np.ndarray, "n _"] | None = None
    sub_minima: Int8[np.ndarray, "n _"] | None = None


PLANE_FORMATS = {
    GGMLType.Q4_0: PlaneFormat(bits=4, offset=8),
    GGMLType.Q4_1: PlaneFormat(bits=4, offset=0, minima=True),
    GGMLType.Q5_0: PlaneFormat(bits=5, offset=16),
    GGMLType.Q5_1: PlaneFormat(bits=5, offset=0, minima=True),
    GGMLType.Q8_0: PlaneFormat(bits=8, offset=128),
    GGMLType.Q4_K: PlaneFormat(bits=4, offset=0, two_level=True, minima=True),
    GGMLType.Q5_K: PlaneFormat(bits=5, offset=0, two_level=True, minima=True),
    GGMLType.Q6_K: PlaneFormat(bits=6, offset=32, group=16, two_level=True),
    GGMLType.IQ4_NL: PlaneFormat(bits=8, offset=128),
    GGMLType.IQ4_XS: PlaneFormat(bits=8, offset=128, two_level=True),
    GGMLType.Q2_K: PlaneFormat(bits=4, offset=0, group=16, two_level=True, minima=True),
    GGMLType.Q3_K: PlaneFormat(bits=4, offset=8, group=16, two_level=True),
    GGMLType.TQ1_0: PlaneFormat(bits=4, offset=8),
    GGMLType.TQ2_0: PlaneFormat(bits=4, offset=8),
    GGMLType.Q1_0: PlaneFormat(bits=4, offset=8),
    GGMLType.Q2_0: PlaneFormat(bits=4, offset=8),
    GGMLType.MXFP4: PlaneFormat(bits=5, offset=16),
    **{kind: PlaneFormat(bits=8, offset=128, group=grid.group, two_level=True) for kind, grid in GRIDS.items()},
}

_MXFP4_CODES = (np.array(MXFP4.kvalues, np.int8) + 16).astype(np.uint8)
_MXFP4_EXPONENTS = range(128 - 24, 128 + 16)  # of the powers of two that float16 has, after `e - 128`
_IQ4_CODES = (np.array(IQ4_NL.kvalues, np.int16) + 128).astype(np.uint8)


def has_planes(raw: UInt8[np.ndarray, " n_bytes"], ggml_type: GGMLType) -> bool:
    """True if a tensor of little-endian bytes can be split into planes: its format can, and its scales are float16."""
    if ggml_type not in PLANE_FORMATS:
        return False
    blocks = raw.reshape(-1, block_layout(ggml_type)[1])
    if ggml_type == GGMLType.MXFP4:
        return int(blocks[:, 0].min()) in _MXFP4_EXPONENTS and int(blocks[:, 0].max()) in _MXFP4_EXPONENTS
    return ggml_type not in GRIDS or has_half_scales(blocks, ggml_type)


def planes(raw: UInt8[np.ndarray, " n_bytes"], ggml_type: GGMLType, shape: tuple[int, int]) -> Planes:
    """Take little-endian tensor bytes apart.

    Args:
        raw: uint8 [n_bytes], whole rows.
        ggml_type: one for which the bytes have planes; see `has_planes`.
        shape: rows, and values in each: a multiple of the type's block.
    """
    per_block, block_bytes = block_layout(ggml_type)
    blocks = raw.reshape(shape[0], shape[1] // per_block, block_bytes)
    parts = take_grid_apart(blocks, ggml_type) if ggml_type in GRIDS else _TAKE_APART[ggml_type](blocks)
    return Planes(**{name: np.ascontiguousarray(part).reshape(shape[0], -1) for name, part in parts.items()})


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    return blocks[..., at : at + 2].copy().view("<f2")


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Bytes `[..., m]` to codes `[..., 2m]`: the low halves, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _q4_0(b: np.ndarray) -> dict[str, np.ndarray]:
    return {"codes": _nibbles(b[..., 2:]), "scales": _half(b, 0)}


def _q4_1(b: np.ndarray) -> dict[str, np.ndarray]:
    return {"codes": _nibbles(b[..., 4:]), "scales": _half(b, 0), "minima": _half(b, 2)}


def _fifth_bits(packed: np.ndarray) -> np.ndarray:
    return np.unpackbits(packed, axis=-1, bitorder="little") << 4


def _q5_0(b: np.ndarray) -> dict[str, np.ndarray]:
    return {"codes": _nibbles(b[..., 6:]) | _fifth_bits(b[..., 2:6]), "scales": _half(b, 0)}


def _q5_1(b: np.ndarray) -> dict[str, np.ndarray]:
    codes = _nibbles(b[..., 8:]) | _fifth_bits(b[..., 4:8])
    return {"codes": codes, "scales": _half(b, 0), "minima": _half(b, 2)}


def _q8_0(b: np.ndarray) -> dict[str, np.ndarray]:
    return {"codes": b[..., 2:] ^ 128, "scales": _half(b, 0)}


def _k_scales(b: np.ndarray) -> dict[str, np.ndarray]:
    """Scales of Q4_K and Q5_K: two float16, then 8 + 8 numbers of six bits in twelve bytes.

    Minima are subtracted there and added here, so their float16 changes its sign.
    """
    low, middle, high = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scales = np.concatenate([low & 63, high & 15 | low >> 6 << 4], axis=-1)
    minima = np.concatenate([middle & 63, high >> 4 | middle >> 6 << 4], axis=-1)
    return {
        "scales": _half(b, 0),
        "minima": -_half(b, 2),
        "sub_scales": scales.view(np.int8),
        "sub_minima": minima.view(np.int8),
    }


def _q4_k(b: np.ndarray) -> dict[str, np.ndarray]:
    return {"codes": _nibbles(b[..., 16:].reshape(*b.shape[:-1], 4, 32)), **_k_scales(b)}


def _q5_k(b: np.ndarray) -> dict[str, np.ndarray]:
    fifth = (b[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1) << 4
    codes = _nibbles(b[..., 48:].reshape(*b.shape[:-1], 4, 32)).reshape(fifth.shape)
    return {"codes": codes | fifth, **_k_scales(b)}


def _q6_k(b: np.ndarray) -> dict[str, np.ndarray]:
    low = _nibbles(b[..., :128].reshape(*b.shape[:-1], 2, 64))
    high = b[..., 128:192].reshape(*b.shape[:-1], 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8) & 3
    codes = low | (high << 4).reshape(low.shape)
    return {"codes": codes, "scales": _half(b, 208), "sub_scales": b[..., 192:208].copy().view(np.int8)}


def _iq4_nl(b: np.ndarray) -> dict[str, np.ndarray]:
    return {"codes": _IQ4_CODES[_nibbles(b[..., 2:])], "scales": _half(b, 0)}


def _iq4_xs(b: np.ndarray) -> dict[str, np.ndarray]:
    low = np.stack([b[..., 4:8] & 15, b[..., 4:8] >> 4], axis=-1).reshape(*b.shape[:-1], 8)
    high = (b[..., 2:4, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(low.shape)
    return {
        "codes": _IQ4_CODES[_nibbles(b[..., 8:].reshape(*b.shape[:-1], 8, 16))],
        "scales": _half(b, 0),
        "sub_scales": (low | high << 4).view(np.int8) - np.int8(32),
    }


def _twos(packed: np.ndarray) -> np.ndarray:
    """Bytes `[..., m, 32]` to codes of two bits `[..., m, 4, 32]`, lowest first."""
    return packed[..., None, :] >> np.array([[0], [2], [4], [6]], np.uint8) & 3


def _q2_k(b: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "codes": _twos(b[..., 16:80].reshape(*b.shape[:-1], 2, 32)),
        "scales": _half(b, 80),
        "minima": -_half(b, 82),
        "sub_scales": (b[..., :16] & 15).view(np.int8),
        "sub_minima": (b[..., :16] >> 4).view(np.int8),
    }


def _q3_k(b: np.ndarray) -> dict[str, np.ndarray]:
    low = _twos(b[..., 32:96].reshape(*b.shape[:-1], 2, 32))
    third = b[..., None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # adds four, which the format takes off
    packed = b[..., 96:108]
    scales = np.concatenate([packed[..., :8] & 15, packed[..., :8] >> 4], axis=-1)
    high = packed[..., None, 8:] >> np.array([[0], [2], [4], [6]], np.uint8) & 3
    return {
        "codes": low + (third << 2).reshape(low.shape) + np.uint8(4),
        "scales": _half(b, 108),
        "sub_scales": (scales | high.reshape(scales.shape) << 4).view(np.int8) - np.int8(32),
    }


def _threes(packed: np.ndarray, n: int) -> np.ndarray:
    """Bytes `[..., m]` to codes -1, 0 and 1 plus eight `[..., n, m]`: digits of fractions in base three."""
    digits = packed[..., None, :] * (3 ** np.arange(n, dtype=np.uint8))[:, None]
    return ((digits.astype(np.uint16) * 3) >> 8).astype(np.uint8) + np.uint8(7)


def _tq1_0(b: np.ndarray) -> dict[str, np.ndarray]:
    parts = (_threes(b[..., a:z], n) for a, z, n in ((0, 32, 5), (32, 48, 5), (48, 52, 4)))
    codes = np.concatenate([part.reshape(*b.shape[:-1], -1) for part in parts], axis=-1)
    return {"codes": codes, "scales": np.repeat(_half(b, 52), 8, axis=-1)}


def _tq2_0(b: np.ndarray) -> dict[str, np.ndarray]:
    codes = _twos(b[..., :64].reshape(*b.shape[:-1], 2, 32)) + np.uint8(7)
    return {"codes": codes, "scales": np.repeat(_half(b, 64), 8, axis=-1)}


def _q1_0(b: np.ndarray) -> dict[str, np.ndarray]:
    signs = np.unpackbits(b[..., 2:], axis=-1, bitorder="little")
    return {"codes": 2 * signs + np.uint8(7), "scales": np.repeat(_half(b, 0), 4, axis=-1)}


def _q2_0(b: np.ndarray) -> dict[str, np.ndarray]:
    codes = (b[..., 2:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3) + np.uint8(7)
    return {"codes": codes, "scales": np.repeat(_half(b, 0), 2, axis=-1)}


def _mxfp4(b: np.ndarray) -> dict[str, np.ndarray]:
    scales = np.ldexp(np.float32(1), b[..., :1].astype(np.int32) - 128).astype(np.float16)
    return {"codes": _MXFP4_CODES[_nibbles(b[..., 1:])], "scales": scales}


_TAKE_APART = {
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
    GGMLType.IQ4_NL: _iq4_nl,
    GGMLType.IQ4_XS: _iq4_xs,
    GGMLType.Q2_K: _q2_k,
    GGMLType.Q3_K: _q3_k,
    GGMLType.TQ1_0: _tq1_0,
    GGMLType.TQ2_0: _tq2_0,
    GGMLType.Q1_0: _q1_0,
    GGMLType.Q2_0: _q2_0,
    GGMLType.MXFP4: _mxfp4,
}
