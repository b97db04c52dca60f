"""nomic-bert (Nomic Embed 1): bert with half-split RoPE instead of learned positions, SwiGLU, and hardly a bias."""

from __future__ import annotations

from oxjax.config import MLPSpec, ModelConfig
from oxjax.models.arch import bert
from oxjax.models.base import Frequencies
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader

NAME = "nomic-bert"
FINAL_NORM = None
layer = bert.layer


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    return bert.bert_config(hp, tensors, pairing="neox", mlp=MLPSpec(hp.uniform("feed_forward_length"), "silu"))
