"""lfm2moe (LFM2 8B-A1B and 24B-A2B): lfm2 with experts after some dense layers."""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.arch import lfm2
from oxjax.models.base import Frequencies
from oxjax.models.experts import expert_spec, gating, with_experts_after_dense
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader

FINAL_NORM = "token_embd_norm"
layer = lfm2.layer


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    base, frequencies = lfm2.config(hp, tensors)
    experts = expert_spec(hp, hp.uniform("expert_feed_forward_length"), gating=gating(hp, "sigmoid"))
    return with_experts_after_dense(hp, base, experts), frequencies
