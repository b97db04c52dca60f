"""smollm3: llama whose every fourth layer knows no positions."""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.base import Frequencies, dense_config, replace_attention
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    base, frequencies = dense_config(hp, tensors, pairing="norm")
    return replace_attention(base, ({"rope": None if i % 4 == 3 else 0} for i in range(hp.n_layers))), frequencies
