"""qwen3moe (Qwen 3 with experts): qwen3 with a mixture on every layer."""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.arch import qwen3
from oxjax.models.arch.qwen2moe import base_width
from oxjax.models.base import Frequencies
from oxjax.models.experts import expert_d_ff, expert_spec, with_experts
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader

layer = qwen3.layer


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    base, frequencies = qwen3.config(hp, tensors)
    return with_experts(base, expert_spec(hp, expert_d_ff(hp, base_width(hp)))), frequencies
