"""qwen2moe (Qwen 1.5 and 2 with experts): qwen2 with a mixture on every layer and a gated expert for all rows."""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.arch import qwen2
from oxjax.models.base import Frequencies
from oxjax.models.experts import expert_d_ff, expert_spec, shared_expert, with_experts
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    base, frequencies = qwen2.config(hp, tensors)
    d_ff = hp.uniform("feed_forward_length")
    shared = shared_expert(hp.get("expert_shared_feed_forward_length", int, 0) or d_ff)
    experts = expert_spec(hp, expert_d_ff(hp, base_width(hp)), norm_topk_prob=False, shared=shared)
    return with_experts(base, experts), frequencies


def base_width(hp: Hyperparameters) -> int:
    """Width of an expert where the file does not say: the used ones share `feed_forward_length`."""
    return hp.uniform("feed_forward_length") // max(hp.uniform("expert_used_count"), 1)
