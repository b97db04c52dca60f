"""gemma: GeGLU, embeddings times sqrt(d_model), half-split RoPE, tied output. Norm weights already include +1."""

from __future__ import annotations

import math

from oxjax.config import MLPSpec, ModelConfig
from oxjax.models.base import Frequencies, dense_config
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    mlp = MLPSpec(hp.uniform("feed_forward_length"), "gelu")
    return dense_config(hp, tensors, pairing="neox", mlp=mlp, embedding_scale=math.sqrt(hp.d_model))
