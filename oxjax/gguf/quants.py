"""Raw tensor bytes -> NumPy arrays, bit for bit what ggml's reference decoder gives."""

import math

import numpy as np
from gguf import quants as gguf_quants
from gguf.constants import GGMLQuantizationType
from jaxtyping import Shaped, UInt8

from oxjax.gguf.ggml_types import ACTIVATION_ONLY, GGMLType, block_layout

_PLAIN_DTYPES = {
    GGMLType.F32: np.dtype("<f4"),
    GGMLType.F64: np.dtype("<f8"),
    GGMLType.I8: np.dtype("i1"),
    GGMLType.I16: np.dtype("<i2"),
    GGMLType.I32: np.dtype("<i4"),
    GGMLType.I64: np.dtype("<i8"),
}

# Where the two-byte fields of a block lie. Only the formats for which ggml defines a big-endian form
# (gguf-py's gguf_convert_endian); elsewhere writers disagree on whether bit masks are words or bytes.
_BIG_ENDIAN_FIELDS = {
    GGMLType.Q4_0: (0,),
    GGMLType.Q8_0: (0,),
    GGMLType.Q4_K: (0, 2),
    GGMLType.Q6_K: (208,),
    GGMLType.MXFP4: (),
    GGMLType.NVFP4: (),
}

# Elements decoded at a time: the temporaries stay in cache and small next to the result.
_SLAB = 1 << 16


def dequantize(
    raw: UInt8[np.ndarray, "n_bytes"], ggml_type: GGMLType | GGMLQuantizationType, shape: tuple[int, ...]
) -> Shaped[np.ndarray, "..."]:
    """Decode little-endian tensor bytes exactly.

    Args:
        raw: uint8 [n_bytes], the tensor as it lies in a little-endian file.
        ggml_type: how it is encoded.
        shape: NumPy order; the blocks run along the last axis.

    Returns:
        An array of that shape: float32 for F32, F16, BF16 and every block format, float64 for F64, the
        integer type itself for I8 to I64. F32, F64 and integers are views of `raw`, the rest is new.

    Raises:
        ValueError: the type is not one of weights, or the bytes do not fit the shape.
    """
    ggml_type = GGMLType(ggml_type)
    if ggml_type in ACTIVATION_ONLY:
        raise ValueError(f"{ggml_type.name} is a format of activations, not of weights")
    per_block, block_bytes = block_layout(ggml_type)
    n_elements = math.prod(shape)
    row = shape[-1] if shape else 1
    if row % per_block or raw.size * per_block != n_elements * block_bytes:
        raise ValueError(
            f"{raw.size} bytes of {ggml_type.name} do not fill shape {shape}: "
            f"each {per_block} elements of a row take {block_bytes}"
        )
    if dtype := _PLAIN_DTYPES.get(ggml_type):
        return raw.view(dtype).reshape(shape)
    out = np.empty(n_elements, np.float32)
    blocks, decoded = raw.reshape(-1, block_bytes), out.reshape(-1, per_block)
    step = max(1, _SLAB // per_block)
    # Corrupt scales are infinite or NaN: they decode to what they are, without a warning.
    with np.errstate(all="ignore"):
        for i in range(0, len(blocks), step):
            decoded[i : i + step] = _decode_blocks(blocks[i : i + step], ggml_type, per_block)
    return out.reshape(shape)


def _decode_blocks(blocks: np.ndarray, ggml_type: GGMLType, per_block: int) -> np.ndarray:
    """Decode uint8 [n, block_bytes] to float32 [n, per_block]."""
    match ggml_type:
        case GGMLType.Q1_0:
            return _decode_q1_0(blocks)
        case GGMLType.Q2_0:
            return _decode_q2_0(blocks)
        case _:
            # One long row: gguf splits what it gets by rows, and rows of one block would be slow.
            row = np.ascontiguousarray(blocks).reshape(1, -1)
            return gguf_quants.dequantize(row, GGMLQuantizationType(ggml_type)).reshape(-1, per_block)


def _decode_q1_0(blocks: np.ndarray) -> np.ndarray:
    """Decode `block_q1_0` (ggml-common.h): an f16 scale, then one sign bit per weight, lowest bit first."""
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    bits = np.unpackbits(blocks[:, 2:], axis=-1, bitorder="little")
    return np.where(bits, scale, -scale)


def _decode_q2_0(blocks: np.ndarray) -> np.ndarray:
    """Decode `block_q2_0` (ggml-common.h): an f16 scale, then two bits a weight, lowest first: -1, 0, 1, 2."""
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    codes = (blocks[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    return (codes.reshape(len(blocks), -1).astype(np.float32) - np.float32(1)) * scale


def has_big_endian_form(ggml_type: GGMLType) -> bool:
    """True if `to_little_endian` knows the type."""
    return block_layout(ggml_type)[0] == 1 or ggml_type in _BIG_ENDIAN_FIELDS


def to_little_endian(raw: UInt8[np.ndarray, "n_bytes"], ggml_type: GGMLType) -> UInt8[np.ndarray, "n_bytes"]:
    """Copy big-endian tensor bytes (uint8 [n_bytes]) into their little-endian form.

    Raises:
        KeyError: ggml defines no big-endian form of the type.
    """
    per_block, block_bytes = block_layout(ggml_type)
    if per_block == 1:
        return raw.reshape(-1, block_bytes)[:, ::-1].reshape(-1)
    blocks = raw.reshape(-1, block_bytes).copy()
    for at in _BIG_ENDIAN_FIELDS[ggml_type]:
        blocks[:, at : at + 2] = blocks[:, at : at + 2][:, ::-1].copy()
    return blocks.reshape(-1)
