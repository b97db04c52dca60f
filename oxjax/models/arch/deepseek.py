"""deepseek (DeepSeekMoE 16B): llama with experts after some dense layers."""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.base import Frequencies, dense_config
from oxjax.models.experts import expert_spec, shared_expert, with_experts_after_dense
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    base, frequencies = dense_config(hp, tensors, pairing="norm")
    d_ff = hp.uniform("expert_feed_forward_length")
    experts = expert_spec(
        hp,
        d_ff,
        norm_topk_prob=False,
        scale=hp.get("expert_weights_scale", float, 0.0) or 1.0,
        shared=shared_expert(d_ff * hp.get("expert_shared_count", int)),
    )
    return with_experts_after_dense(hp, base, experts), frequencies
