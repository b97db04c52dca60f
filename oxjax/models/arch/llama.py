"""llama: Llama 1 to 3, Mistral 7B, Mixtral, TinyLlama, SmolLM, Yi, and the many that reuse it.

RMS norms, interleaved RoPE (the converter permutes q and k for it), SwiGLU. Llama 3 brings `rope_freqs`.
The sliding window of Mistral 7B is not in its metadata and not applied.
"""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.base import Frequencies, dense_config
from oxjax.models.experts import expert_spec, with_experts
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; with an `expert_count` every layer is a mixture (Mixtral)."""
    config, frequencies = dense_config(hp, tensors, pairing="norm")
    if hp.get("expert_count", int, 0):
        experts = expert_spec(hp, hp.uniform("feed_forward_length"))
        config = with_experts(config, experts)
    return config, frequencies
