"""The tensor types of GGUF and how each lays its elements out in bytes."""

from __future__ import annotations

from enum import IntEnum

from gguf.constants import GGML_QUANT_SIZES


class GGMLType(IntEnum):
    """Tensor type ids of GGUF (`enum ggml_type` in ggml.h); ids that ggml removed are left out.

    Equal, and equal in hash, to the members of `gguf.GGMLQuantizationType`, which may know fewer.
    """

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42


# ggml quantises activations to these on the fly; no file carries weights in them.
ACTIVATION_ONLY = frozenset({GGMLType.Q8_1, GGMLType.Q8_K})

_LATER_THAN_GGUF_PY = {GGMLType.Q1_0: (128, 2 + 16), GGMLType.Q2_0: (64, 2 + 16)}
_LAYOUTS = {int(kind): layout for kind, layout in GGML_QUANT_SIZES.items()} | _LATER_THAN_GGUF_PY


def block_layout(ggml_type: GGMLType) -> tuple[int, int]:
    """Elements in one block of the type and bytes it takes; plain types are blocks of one element."""
    return _LAYOUTS[ggml_type]
