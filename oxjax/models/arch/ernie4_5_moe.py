"""ernie4_5-moe: llama whose every n-th layer after some dense ones mixes experts, chosen with a bias."""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.base import Frequencies, dense_config
from oxjax.models.experts import expert_spec, shared_expert, with_experts
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader

NAME = "ernie4_5-moe"


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; rotations by sections are, for text, the same rotation."""
    hp.ignore("rope.dimension_sections")
    base, frequencies = dense_config(hp, tensors, pairing="norm")
    shared = shared_expert(hp.get("expert_shared_feed_forward_length", int, 0))
    experts = expert_spec(hp, hp.uniform("expert_feed_forward_length"), shared=shared)
    n_dense, every = hp.get("leading_dense_block_count", int, 0), hp.uniform("interleave_moe_layer_step")
    return with_experts(base, experts, lambda i: i >= n_dense and (i + 1) % every == 0), frequencies
