"""Specs of mixtures of experts, from metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from oxjax.config import MLPSpec, ModelConfig, MoESpec
from oxjax.models.hyperparameters import Hyperparameters

GATINGS = {1: "softmax", 2: "sigmoid", 3: "softmax_topk"}  # `expert_gating_func`


def gating(hp: Hyperparameters, default: str) -> str:
    """Gating function from `expert_gating_func`; 0 means the default, as a missing key does."""
    kind = hp.get("expert_gating_func", int, 0)
    if kind and kind not in GATINGS:
        raise hp.error("expert_gating_func", f"found {kind}, expected one of {sorted(GATINGS)}")
    return GATINGS.get(kind, default)


def expert_d_ff(hp: Hyperparameters, default: int) -> int:
    """Width of an expert, from `expert_feed_forward_length`; missing or 0 means the default."""
    return (hp.per_layer("expert_feed_forward_length", 0)[0] and hp.uniform("expert_feed_forward_length")) or default


def shared_expert(d_ff: int) -> MLPSpec | None:
    """Spec of a SwiGLU shared expert of this width; None for 0."""
    return MLPSpec(d_ff, "silu") if d_ff else None


def expert_spec(hp: Hyperparameters, d_ff: int, *, n_experts_per_token: int | None = None, **more: Any) -> MoESpec:
    """Spec of a layer's mixture of experts: counts and groups from the metadata, the rest from `more`."""
    n_experts = hp.get("expert_count", int)
    used = hp.uniform("expert_used_count") if n_experts_per_token is None else n_experts_per_token
    if not 0 < used <= n_experts:
        raise hp.error("expert_used_count", f"found {used} of expert_count {n_experts}")
    n_groups = max(hp.get("expert_group_count", int, 1), 1)
    n_groups_used = hp.get("expert_group_used_count", int, 0) or n_groups
    if n_experts % n_groups:
        raise hp.error("expert_group_count", f"{n_groups} does not divide expert_count {n_experts}")
    if not n_groups_used <= n_groups or used > n_experts // n_groups * n_groups_used:
        raise hp.error("expert_group_used_count", f"{n_groups_used} of {n_groups} groups are too many or too few")
    groups = {} if n_groups == 1 else {"n_groups": n_groups, "n_groups_used": n_groups_used}
    return MoESpec(n_experts, used, d_ff, **groups, **more)


def expert_weight_options(hp: Hyperparameters) -> dict[str, Any]:
    """Fields of `MoESpec` from `expert_weights_*`: normalisation and scale of the router's weights."""
    return {
        "norm_topk_prob": hp.get("expert_weights_norm", bool, False),
        "scale": hp.get("expert_weights_scale", float, 0.0) or 1.0,
    }


def with_experts(config: ModelConfig, experts: MoESpec, where: Callable[[int], bool] = lambda i: True) -> ModelConfig:
    """Config with experts in place of the feed-forward layer, on all layers or those that `where` selects."""
    layers = (dataclasses.replace(layer, mlp=experts) if where(i) else layer for i, layer in enumerate(config.layers))
    return dataclasses.replace(config, layers=tuple(layers))


def with_experts_after_dense(hp: Hyperparameters, config: ModelConfig, experts: MoESpec) -> ModelConfig:
    """Config with experts on all layers except the first `leading_dense_block_count`."""
    n_dense = hp.get("leading_dense_block_count", int, 0)
    return with_experts(config, experts, lambda i: i >= n_dense)
