"""Every architecture by its `general.architecture` name: one module each."""

from __future__ import annotations

from typing import Any, Protocol

from oxjax.config import LayerSpec, ModelConfig
from oxjax.models import gemma, gemma2, gemma3, llama, phi3, qwen2, qwen3
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader


class Architecture(Protocol):
    """What a module under `oxjax/models` provides."""

    def config(self, hp: Hyperparameters, tensors: ParamLoader) -> Any:
        """Metadata to `ModelConfig`, and the float32 rotation frequencies of its `ropes`."""

    def layer(self, tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> Any:
        """Parameters of block `i`."""

    def block(self, *args: Any) -> Any:
        """`block(p, x, state, spec, ctx)`: residual rows and state in, both out (see `layers.transformer`)."""


ARCHITECTURES: dict[str, Any] = {
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "llama": llama,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
}
