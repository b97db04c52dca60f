"""bailingmoe2 (Ling 2, Ring 2): norms of queries and keys, experts after some dense layers."""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.arch import qwen3
from oxjax.models.base import Frequencies, dense_config
from oxjax.models.experts import expert_spec, expert_weight_options, gating, shared_expert, with_experts_after_dense
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader

layer = qwen3.layer


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; as many shared experts as `expert_shared_count`, side by side in one."""
    base, frequencies = dense_config(hp, tensors, pairing="neox")
    d_ff = hp.uniform("expert_feed_forward_length")
    shared = hp.get("expert_shared_feed_forward_length", int, 0) or d_ff
    experts = expert_spec(
        hp,
        d_ff,
        gating=gating(hp, "softmax"),
        **expert_weight_options(hp),
        shared=shared_expert(shared * hp.get("expert_shared_count", int)),
    )
    return with_experts_after_dense(hp, base, experts), frequencies
