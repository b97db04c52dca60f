"""llama: Llama 1 to 3, Mistral 7B, TinyLlama, SmolLM, Yi, and the many that reuse it.

RMS norms, interleaved RoPE (the converter permutes q and k for it), SwiGLU. Llama 3 brings `rope_freqs`.
The sliding window of Mistral 7B is not in its metadata and not applied.
"""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.base import Frequencies, dense_config
from oxjax.models.base import dense_layer as layer
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.transformer import transformer_block as block
from oxjax.models.loader import ParamLoader

__all__ = ["block", "config", "layer"]


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; experts are another architecture's business."""
    if hp.get("expert_count", int, 0):
        raise hp.error("expert_count", "mixture-of-experts llama models are not supported yet")
    return dense_config(hp, tensors, pairing="norm")
