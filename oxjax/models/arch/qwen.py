"""qwen (Qwen 1): qwen2 with q, k, v in one tensor; its feed-forward key counts gate and up together."""

from __future__ import annotations

from oxjax.config import MLPSpec, ModelConfig
from oxjax.models.base import Frequencies, dense_config
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    return dense_config(hp, tensors, pairing="neox", mlp=MLPSpec(hp.uniform("feed_forward_length") // 2, "silu"))
