"""phimoe (Phi-3.5-MoE): phi3 with a mixture on every layer, norms and maps with biases."""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.arch import qwen2
from oxjax.models.base import Frequencies
from oxjax.models.experts import expert_spec, with_experts
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    base, frequencies = qwen2.config(hp, tensors)
    return with_experts(base, expert_spec(hp, hp.uniform("feed_forward_length"))), frequencies
