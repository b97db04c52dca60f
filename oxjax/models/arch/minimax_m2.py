"""minimax-m2: partial RoPE, norms of all queries and all keys at once, a mixture on every layer."""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.arch import olmoe
from oxjax.models.base import Frequencies, dense_config
from oxjax.models.experts import expert_spec, gating, with_experts
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader

NAME = "minimax-m2"
layer = olmoe.layer


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; the experts are as wide as `feed_forward_length`."""
    hp.ignore("expert_feed_forward_length")
    base, frequencies = dense_config(hp, tensors, pairing="neox")
    experts = expert_spec(hp, hp.uniform("feed_forward_length"), gating=gating(hp, "sigmoid"))
    return with_experts(base, experts), frequencies
