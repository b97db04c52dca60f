"""phi3 (Phi-3, 3.5 and 4-mini): half-split RoPE, partial in phi-4-mini, LongRoPE factors; q, k, v in one
tensor and gate, up in one. Its sliding window is ignored: the published models were trained without it.
"""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.base import Frequencies, dense_config
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    return dense_config(hp, tensors, pairing="neox")
