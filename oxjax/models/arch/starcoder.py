"""starcoder (StarCoder 1, SantaCoder): gpt2 with one key and value head, which the metadata says."""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.base import Frequencies, dense_config, ungated_mlp
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    return dense_config(hp, tensors, pairing=None, norm="layer", mlp=ungated_mlp(hp), learned_positions=True)
