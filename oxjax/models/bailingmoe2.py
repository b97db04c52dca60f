"""bailingmoe2 (Ling 2, Ring 2): norms of queries and keys, experts after some dense layers."""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.base import Frequencies, dense_config
from oxjax.models.experts import expert_spec, gating, silu, with_experts
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.block import block
from oxjax.models.loader import ParamLoader
from oxjax.models.qwen3 import layer

__all__ = ["block", "config", "layer"]


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; as many shared experts as `expert_shared_count`, side by side in one."""
    base, frequencies = dense_config(hp, tensors, pairing="neox")
    d_ff = hp.uniform("expert_feed_forward_length")
    shared = hp.get("expert_shared_feed_forward_length", int, 0) or d_ff
    experts = expert_spec(
        hp,
        d_ff,
        gating=gating(hp, "softmax"),
        renormalise=hp.get("expert_weights_norm", bool, False),
        scale=hp.get("expert_weights_scale", float, 0.0) or 1.0,
        shared=silu(shared * hp.get("expert_shared_count", int)),
    )
    n_dense = hp.get("leading_dense_block_count", int, 0)
    return with_experts(base, experts, lambda i: i >= n_dense), frequencies
