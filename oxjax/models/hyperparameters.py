"""A typed view of `<arch>.*` metadata: the keys that most architectures share, with GGUF's defaults."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from oxjax.errors import ModelError
from oxjax.gguf import REQUIRED, GGUFFile
from oxjax.models.layers.rope import RopeScaling

logger = logging.getLogger("oxjax")

_MAX_BLOCKS = 4096  # far above any model; a lying count must not make us build lists of 2^32

# Keys that change results unless they have these values; an architecture that does not read them refuses others.
_NEUTRAL: dict[str, Callable[[Hyperparameters], Any]] = {
    "attention.causal": lambda hp: True,
    "attention.key_length_swa": lambda hp: hp.key_dim,
    "attention.value_length_swa": lambda hp: hp.value_dim,
    "expert_count": lambda hp: 0,
    "rope.dimension_count_swa": lambda hp: hp.rope_dim,
}
# Keys without effect that converters write: facts that follow from the architecture or its tensors, and settings of
# other tasks than predicting the next token.
_HARMLESS = {
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "classifier.output_labels",
    "classifier.pooling_type",
    "embedding_length_out",
    "expert_used_count",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "use_parallel_residual",
}


class Hyperparameters:
    """Reads the metadata of one file under its architecture's prefix.

    Args:
        file: an open GGUF file.
        max_context: tokens per sequence that the session is set up for; LongRoPE chooses its factors by it.
            None means the context that the model was trained for.
    """

    def __init__(self, file: GGUFFile, max_context: int | None = None):
        self.file = file
        self._used: set[str] = set()
        self.arch: str = file.get("general.architecture", str)
        self.context_length: int = self._positive("context_length")
        self.max_context = self.context_length if max_context is None else max_context
        self.d_model = self._positive("embedding_length")
        self.n_blocks = self._positive("block_count", most=_MAX_BLOCKS)
        # Blocks at the end that predict further tokens take no part in predicting the next one.
        self.n_layers = self.n_blocks - self.get("nextn_predict_layers", int, 0)
        if not 0 < self.n_layers <= self.n_blocks:
            raise self.error("nextn_predict_layers", f"leaves {self.n_layers} of {self.n_blocks} blocks")

    def key(self, key: str) -> str:
        """Full name `<arch>.<key>`; marks the key as used."""
        self._used.add(key)
        return f"{self.arch}.{key}"

    def ignore(self, key: str) -> None:
        """Mark a key as known and without effect, so that `finish` does not report it."""
        self._used.add(key)

    def finish(self) -> None:
        """Refuse or report keys that nothing has read; call it when the config is made.

        Raises:
            ModelError: a key that this architecture does not read has a value that would change results.
        """
        prefix = f"{self.arch}."
        own = [name.removeprefix(prefix) for name in self.file.metadata if name.startswith(prefix)]
        unused = [key for key in own if key not in self._used]
        for key in unused:
            value = self.file.metadata[prefix + key]
            if key in _NEUTRAL and value != (expected := _NEUTRAL[key](self)):
                raise self.error(key, f"found {value!r}, but {self.arch} is only supported with {expected!r}")
        if unknown := [key for key in unused if key not in _HARMLESS and key not in _NEUTRAL]:
            logger.warning("%s: metadata without effect: %s", self.file.path, ", ".join(map(prefix.__add__, unknown)))

    def get(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """`<arch>.<key>` as `kind`; GGUFError if it is missing without a default or has another type."""
        return self.file.get(self.key(key), kind, default)

    def error(self, key: str, message: str) -> ModelError:
        """Build the error about `<arch>.<key>`."""
        return ModelError(f"{self.file.path}: {self.arch}.{key}: {message}")

    def _positive(self, key: str, most: int = 2**31 - 1) -> int:
        value = self.get(key, int)
        if not 0 < value <= most:
            raise self.error(key, f"found {value}, expected 1 to {most}")
        return value

    def per_layer(self, key: str, default: Sequence[int] | int | None = None) -> tuple[int, ...]:
        """Read a key that is one number for all layers or an array with one per layer."""
        full = self.key(key)
        if default is not None and full not in self.file.metadata:
            return (default,) * self.n_layers if isinstance(default, int) else tuple(default)
        if isinstance(self.file.metadata.get(full), int):
            return (self.get(key, int),) * self.n_layers
        values = self.file.get_array(full, int)
        if len(values) < self.n_layers:
            raise self.error(key, f"has {len(values)} entries for {self.n_layers} layers")
        return tuple(int(v) for v in values[: self.n_layers])

    def uniform(self, key: str, default: int | None = None) -> int:
        """Read a positive key that must be the same on all layers."""
        values = set(self.per_layer(key, default))
        if len(values) != 1:
            raise self.error(key, f"differs between layers ({sorted(values)}), which {self.arch} does not do")
        value = values.pop()
        if value <= 0:
            raise self.error(key, f"found {value}, expected a positive number")
        return value

    @cached_property
    def n_heads(self) -> int:
        """Number of query heads, of the layers that have any."""
        counts = set(self.per_layer("attention.head_count")) - {0}
        return counts.pop() if len(counts) == 1 and min(counts) > 0 else self.uniform("attention.head_count")

    @cached_property
    def n_kv_heads(self) -> int:
        """Number of key and value heads; divides the query heads."""
        n = self.uniform("attention.head_count_kv", self.n_heads)
        if self.n_heads % n:
            raise self.error("attention.head_count_kv", f"{n} does not divide head_count {self.n_heads}")
        return n

    def _head_dim(self, key: str) -> int:
        if self.get(key, int, None) is None and self.d_model % self.n_heads:
            raise self.error(key, f"missing, and embedding_length {self.d_model} / {self.n_heads} is no integer")
        dim = self.get(key, int, self.d_model // self.n_heads)
        if not 0 < dim <= 65536:
            raise self.error(key, f"found {dim}, expected 1 to 65536")
        return dim

    @cached_property
    def key_dim(self) -> int:
        """Head dimension of queries and keys."""
        return self._head_dim("attention.key_length")

    @cached_property
    def value_dim(self) -> int:
        """Head dimension of values."""
        return self._head_dim("attention.value_length")

    @cached_property
    def rope_dim(self) -> int:
        """Number of leading dimensions of a head that RoPE rotates."""
        dim = self.get("rope.dimension_count", int, self.key_dim)
        if dim % 2 or not 0 < dim <= self.key_dim:
            raise self.error("rope.dimension_count", f"found {dim}, expected even, at most key_length {self.key_dim}")
        return dim

    @cached_property
    def rope_theta(self) -> float:
        """Base of the rotation frequencies."""
        theta = self.get("rope.freq_base", float, 10000.0)
        if not theta > 1.0:
            raise self.error("rope.freq_base", f"found {theta}, expected more than 1")
        return theta

    @cached_property
    def rms_eps(self) -> float:
        """Epsilon of RMS norms."""
        return self.get("attention.layer_norm_rms_epsilon", float)

    @cached_property
    def layer_eps(self) -> float:
        """Epsilon of layer norms."""
        return self.get("attention.layer_norm_epsilon", float)

    @cached_property
    def rope_scaling(self) -> RopeScaling:
        """`rope.scaling.*`, with the legacy `rope.scale_linear`."""
        kind = self.get("rope.scaling.type", str, "linear")
        if kind not in ("none", "linear", "yarn", "longrope"):
            raise self.error("rope.scaling.type", f"{kind!r} is not none, linear, yarn or longrope")
        factor = self.get("rope.scaling.factor", float, 0.0) or self.get("rope.scale_linear", float, 0.0)
        if factor < 0.0:
            raise self.error("rope.scaling.factor", f"found {factor}, expected a positive number")
        return RopeScaling(
            kind=kind,
            factor=factor or 1.0,
            original_context=self.get("rope.scaling.original_context_length", int, 0) or self.context_length,
            attn_factor=self.get("rope.scaling.attn_factor", float, 0.0) or 1.0,
        )

    def window_layers(self, default_period: int, *, full_first: bool = False) -> tuple[bool, ...]:
        """True for each layer with a sliding window: an explicit array, or all but every n-th layer.

        Args:
            default_period: n, if the file does not state it; 0 makes all layers slide.
            full_first: the first of n layers has full attention, not the last one.
        """
        key = self.key("attention.sliding_window_pattern")
        stored = self.file.metadata.get(key)
        if stored is not None and not isinstance(stored, int):
            flags = self.file.get_array(
                key, bool if isinstance(stored, np.ndarray) and stored.dtype.kind == "b" else int
            )
            if len(flags) < self.n_layers:
                raise self.error("attention.sliding_window_pattern", f"{len(flags)} entries, {self.n_layers} layers")
            return tuple(bool(f) for f in flags[: self.n_layers])
        period = self.get("attention.sliding_window_pattern", int, default_period)
        full = 0 if full_first else period - 1
        return tuple(period == 0 or i % period != full for i in range(self.n_layers))
