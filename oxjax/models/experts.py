"""Mixtures of experts as metadata describes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from oxjax.config import MLPSpec, ModelConfig, MoESpec
from oxjax.models.hyperparameters import Hyperparameters

GATINGS = {1: "softmax", 2: "sigmoid", 3: "chosen"}  # `expert_gating_func`


def gating(hp: Hyperparameters, default: str) -> str:
    """`expert_gating_func`; 0 stands for a missing one."""
    kind = hp.get("expert_gating_func", int, 0)
    if kind and kind not in GATINGS:
        raise hp.error("expert_gating_func", f"found {kind}, expected one of {sorted(GATINGS)}")
    return GATINGS.get(kind, default)


def expert_d_ff(hp: Hyperparameters, default: int) -> int:
    """`expert_feed_forward_length`; missing or 0 means the default."""
    return (hp.per_layer("expert_feed_forward_length", 0)[0] and hp.uniform("expert_feed_forward_length")) or default


def silu(d_ff: int) -> MLPSpec | None:
    """A shared expert of this width; None for 0."""
    return MLPSpec(d_ff, "silu") if d_ff else None


def expert_spec(hp: Hyperparameters, d_ff: int, **more: Any) -> MoESpec:
    """The mixture of a layer: counts and groups from the metadata, the rest given."""
    n_experts = hp.get("expert_count", int)
    used = hp.uniform("expert_used_count")
    if used > n_experts:
        raise hp.error("expert_used_count", f"found {used} of expert_count {n_experts}")
    n_groups = max(hp.get("expert_group_count", int, 1), 1)
    n_groups_used = hp.get("expert_group_used_count", int, 0) or n_groups
    if n_experts % n_groups:
        raise hp.error("expert_group_count", f"{n_groups} does not divide expert_count {n_experts}")
    if not n_groups_used <= n_groups or used > n_experts // n_groups * n_groups_used:
        raise hp.error("expert_group_used_count", f"{n_groups_used} of {n_groups} groups are too many or too few")
    groups = {} if n_groups == 1 else {"n_groups": n_groups, "n_groups_used": n_groups_used}
    return MoESpec(n_experts, used, d_ff, **groups, **more)


def with_experts(config: ModelConfig, experts: MoESpec, where: Callable[[int], bool] = lambda i: True) -> ModelConfig:
    """The config with experts in place of the feed-forward network, on all layers or those of some numbers."""
    layers = (dataclasses.replace(layer, mlp=experts) if where(i) else layer for i, layer in enumerate(config.layers))
    return dataclasses.replace(config, layers=tuple(layers))
