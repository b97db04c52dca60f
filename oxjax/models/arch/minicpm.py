"""minicpm (MiniCPM 1 and 2): granite's multipliers, with values that old files do not state."""

from __future__ import annotations

import math

from oxjax.config import ModelConfig
from oxjax.models.base import Frequencies, dense_config
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    divisor = hp.get("logit_scale", float, 256.0 / hp.d_model)
    if divisor == 0.0:
        raise hp.error("logit_scale", "found 0, but logits are divided by it")
    return dense_config(
        hp,
        tensors,
        pairing="norm",
        embedding_scale=hp.get("embedding_scale", float, 12.0) or 1.0,
        residual_scale=hp.get("residual_scale", float, 1.4 / math.sqrt(hp.n_layers)) or 1.0,
        logit_scale=1.0 / divisor,
    )
