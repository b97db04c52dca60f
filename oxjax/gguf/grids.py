"""Block formats whose values are points of a grid (IQ1, IQ2, IQ3) taken apart into integers and scales.

A value is `scale * (2 s + 1) * point`: 256 values share the scale, a group of them the small integer `s`. The points
come from the `gguf` package, which knows the grids: blocks whose scales are set to one decode to integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gguf import quants as gguf_quants
from gguf.constants import GGMLQuantizationType
from jaxtyping import Float16, UInt8

from oxjax.gguf.ggml_types import GGMLType


@dataclass(frozen=True)
class Grid:
    """Layout of the scales of a format.

    Attributes:
        group: values that share `s`.
        unit: the stored scale of which the decoder makes integers where `s` is 0; `scale` is the stored one over it.
        small: the bytes that hold `s`, as of `slice`.
        both: each half of such a byte is an `s`, the lower one first; if False, only the upper half is.
        mask: the bits of a half that are `s`.
    """

    group: int
    unit: int
    small: tuple[int, int, int]
    both: bool = True
    mask: int = 15


GRIDS = {
    GGMLType.IQ2_XXS: Grid(32, 8, (9, 66, 8), both=False),
    GGMLType.IQ2_XS: Grid(16, 8, (66, 74, 1)),
    GGMLType.IQ2_S: Grid(16, 8, (74, 82, 1)),
    GGMLType.IQ3_XXS: Grid(32, 2, (69, 98, 4), both=False),
    GGMLType.IQ3_S: Grid(32, 1, (106, 110, 1)),
    GGMLType.IQ1_S: Grid(32, 8, (35, 50, 2), both=False, mask=7),
    GGMLType.IQ1_M: Grid(16, 8, (48, 56, 1)),  # in pieces: see `_read_iq1_m`
}


def take_grid_apart(blocks: UInt8[np.ndarray, "*n block_bytes"], ggml_type: GGMLType) -> dict[str, np.ndarray]:
    """Fields of `Planes` of blocks, a block to a row; codes are 128 more than the points."""
    grid, flat = GRIDS[ggml_type], blocks.reshape(-1, blocks.shape[-1]).copy()
    stored, small = (_read_iq1_m if ggml_type == GGMLType.IQ1_M else _read)(flat, grid)
    _set_to_one(flat, ggml_type)
    points = gguf_quants.dequantize(flat.reshape(1, -1), GGMLQuantizationType(ggml_type))
    return {
        "codes": (points.reshape(len(flat), -1) + 128).astype(np.uint8),
        "scales": _divided(stored, grid),
        "sub_scales": (2 * small + 1).astype(np.int8),
    }


def has_half_scales(blocks: UInt8[np.ndarray, "n block_bytes"], ggml_type: GGMLType) -> bool:
    """True if the scales of blocks, divided by the unit, are finite and exact in float16."""
    grid = GRIDS[ggml_type]
    stored, _ = (_read_iq1_m if ggml_type == GGMLType.IQ1_M else _read)(blocks, grid)
    wide = stored.astype(np.float32)
    return bool((np.isfinite(wide) & (_divided(stored, grid).astype(np.float32) * grid.unit == wide)).all())


def _divided(stored: Float16[np.ndarray, "n 1"], grid: Grid) -> Float16[np.ndarray, "n 1"]:
    return (stored.astype(np.float32) / np.float32(grid.unit)).astype(np.float16)


def _read(blocks: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """The stored float16 scale and `s` of each group."""
    small = blocks[:, slice(*grid.small)]
    halves = np.stack([small, small >> 4], axis=-1) if grid.both else small[..., None] >> 4
    return blocks[:, :2].copy().view("<f2"), (halves & np.uint8(grid.mask)).reshape(len(blocks), -1)


def _read_iq1_m(blocks: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Four words, each with a quarter of the scale above four times three bits."""
    words = blocks[:, slice(*grid.small)].copy().view("<u2")
    stored = np.bitwise_or.reduce((words >> 12) << np.array([0, 4, 8, 12], np.uint16), axis=1, keepdims=True)
    small = words[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7
    return stored.view(np.float16), small.astype(np.uint8).reshape(len(blocks), -1)


def _set_to_one(blocks: np.ndarray, ggml_type: GGMLType) -> None:
    """Make the stored scale the unit, and every `s` 0."""
    grid = GRIDS[ggml_type]
    unit, small = np.array([grid.unit], "<f2"), slice(*grid.small)
    if ggml_type == GGMLType.IQ1_M:
        words = (unit.view(np.uint16) >> np.array([0, 4, 8, 12], np.uint16)) << np.uint16(12)
        blocks[:, small] = words.astype("<u2").view(np.uint8)
        return
    blocks[:, :2] = unit.view(np.uint8)
    blocks[:, small] &= np.uint8(0 if grid.both else ~(grid.mask << 4) & 255)
