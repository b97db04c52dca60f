"""olmoe: norms of all queries and all keys at once, a mixture on every layer."""

from __future__ import annotations

from oxjax.config import LayerSpec, ModelConfig
from oxjax.models.arch import qwen2
from oxjax.models.base import Frequencies, load_layer
from oxjax.models.experts import expert_spec, with_experts
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.block import Layer
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    base, frequencies = qwen2.config(hp, tensors)
    experts = expert_spec(hp, hp.uniform("feed_forward_length"), norm_topk_prob=False)
    return with_experts(base, experts), frequencies


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> Layer:
    """Block `i`."""
    return load_layer(tensors, i, spec, config, qk_norm="whole")
