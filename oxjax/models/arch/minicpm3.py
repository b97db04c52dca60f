"""minicpm3: minicpm with latent attention; its multipliers are constants, whatever the metadata says."""

from __future__ import annotations

import math

from oxjax.config import ModelConfig
from oxjax.models.base import Frequencies, dense_config
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.latent import with_latent
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    config, frequencies = dense_config(
        hp,
        tensors,
        pairing="neox",
        embedding_scale=12.0,
        residual_scale=1.4 / math.sqrt(hp.n_layers),
        logit_scale=256.0 / hp.d_model,
    )
    return with_latent(hp, config), frequencies
