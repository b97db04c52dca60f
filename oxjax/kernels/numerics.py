"""The choices that decide how results are rounded, as one static value."""

from __future__ import annotations

from dataclasses import dataclass

from oxjax.errors import ModelError

ACTIVATIONS = ("int8", "float32")
BACKENDS = ("native", "xla")
KV_BLOCK = 128  # keys that attention sums together, counted from position 0; a page divides it


@dataclass(frozen=True)
class Numerics:
    """Everything besides model and input that the bits of a result depend on; static under `jax.jit`.

    Attributes:
        exact: the bits of a row depend neither on the other rows nor on their number, chunking or padding.
        activations: type of the activations in products with quantised weights. "int8" rounds them in groups of 32,
            which native kernels do as llama.cpp does; "float32" does not. The XLA backend never rounds.
        backend: "native", our kernels in C++ for CPUs, or "xla", which runs everywhere.

    Raises:
        ModelError: an unknown name.
    """

    exact: bool = True
    activations: str = "int8"
    backend: str = "xla"

    def __post_init__(self) -> None:
        for name, known in (("activations", ACTIVATIONS), ("backend", BACKENDS)):
            if (value := getattr(self, name)) not in known:
                raise ModelError(f"{name} {value!r} is not one of {', '.join(known)}")

    @property
    def native(self) -> bool:
        """The backend is "native"."""
        return self.backend == "native"
