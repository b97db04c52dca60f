"""nemotron (Nemotron 3 and 4, Minitron): layer norms with biases, partial half-split RoPE, a squared-ReLU MLP."""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.base import Frequencies, dense_config, ungated_mlp
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    return dense_config(hp, tensors, pairing="neox", norm="layer", mlp=ungated_mlp(hp, "relu2"))
