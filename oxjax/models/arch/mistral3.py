"""mistral3 (Ministral 3): llama with YaRN settings of its own, and queries that grow with their position."""

from __future__ import annotations

import dataclasses

from oxjax.config import ModelConfig, TemperatureSpec
from oxjax.models.base import Frequencies, dense_config
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    scaling = dataclasses.replace(
        hp.rope_scaling,
        beta_fast=hp.get("rope.scaling.yarn_beta_fast", float, 32.0),
        beta_slow=hp.get("rope.scaling.yarn_beta_slow", float, 1.0),
        log_multiplier=hp.get("rope.scaling.yarn_log_multiplier", float, 0.0),
    )
    growth = hp.get("attention.temperature_scale", float, 0.0)
    temperature = TemperatureSpec(growth, scaling.original_context) if growth else None
    return dense_config(hp, tensors, pairing="norm", scaling=scaling, attention={"temperature": temperature})
