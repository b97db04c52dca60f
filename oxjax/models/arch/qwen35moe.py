"""qwen35moe (Qwen 3.5 with experts): qwen35 with qwen3next's feed-forward layers."""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.arch import qwen3next
from oxjax.models.base import Frequencies
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader

layer = qwen3next.layer


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    hp.ignore("rope.dimension_sections")
    return qwen3next.delta_net_config(hp, tensors, qwen3next.experts(hp), tiled=True)
