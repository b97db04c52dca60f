"""`LoadOptions`: the choices that a model file is loaded with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oxjax.config import DTYPES
from oxjax.errors import ModelError
from oxjax.gguf import GGMLType
from oxjax.kernels.numerics import ACTIVATIONS, BACKENDS

QUANTIZE = {"q8_0": GGMLType.Q8_0, "q4_0": GGMLType.Q4_0}
WEIGHTS = ("auto", "file", *DTYPES, *QUANTIZE)


@dataclass(frozen=True)
class LoadOptions:
    """The choices that a model file is loaded with; every field changes results.

    Attributes:
        exact: bits do not depend on the rest of the batch, on chunking or padding.
        dtype: "float32" or "bfloat16", of activations and pages.
        weights: the form that matrices are held in. "file" keeps them as in the file: integers where the format
            allows it, float16 and bfloat16 as they are, and everything else in `dtype`. "q8_0" and "q4_0" do the same,
            and quantise float32, float16 and bfloat16 matrices whose rows are a multiple of 32 long while they are
            loaded, as the `gguf` package does. "float32" and "bfloat16" dequantise. "auto" is "file" with the
            native backend, else `dtype`.
        activations: "int8", which is fast, or "float32": the type of activations in native products with quantised
            weights. "int8" rounds them to 8 bits, as llama.cpp does; "float32" computes what dequantised weights
            would, in the memory of quantised ones.
        backend: "native", kernels in C++ for CPUs, or "xla". "auto" is "native" wherever there are kernels.
        max_context: tokens per sequence to prepare for; only LongRoPE models depend on it.

    Raises:
        ModelError: a value is not one of those.
    """

    exact: bool = True
    dtype: str = "float32"
    weights: str = "auto"
    activations: str = "int8"
    backend: str = "auto"
    max_context: int | None = None

    def __post_init__(self) -> None:
        if self.weights == "quantized":
            raise ModelError("weights 'quantized' is now called 'file'")
        known = {"dtype": DTYPES, "weights": WEIGHTS, "activations": ACTIVATIONS, "backend": ("auto", *BACKENDS)}
        for name, values in known.items():
            if (value := getattr(self, name)) not in values:
                raise ModelError(f"{name} {value!r} is not one of {', '.join(values)}")


def refuse_keywords(unknown: dict[str, Any]) -> None:
    """Refuse keywords that are not options, naming the new spelling of those that once were.

    Raises:
        ModelError: `quantize`, which `weights` has replaced.
        TypeError: any other.
    """
    if (value := unknown.pop("quantize", None)) is not None:
        raise ModelError(f"quantize={value!r} is now weights={value!r}")
    if unknown:
        raise TypeError(f"unexpected keywords: {', '.join(unknown)}")
