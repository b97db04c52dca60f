"""deepseek2 (DeepSeek V2, V3 and R1, Kimi K2, GLM-4.7-Flash): latent attention; experts after some dense layers.

Its YaRN keeps the rotation's magnitude at one where the file has a log multiplier, and scales the scores instead.
"""

from __future__ import annotations

import dataclasses
import math

from oxjax.config import ModelConfig, TemperatureSpec
from oxjax.models.base import Frequencies, dense_config
from oxjax.models.experts import expert_spec, expert_weight_options, gating, shared_expert, with_experts_after_dense
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.latent import with_latent
from oxjax.models.loader import ParamLoader

_GLM_FLASH = {47, 48}, 154880  # layers and vocabulary of the one that files without a gating function do not say


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    log_multiplier = hp.get("rope.scaling.yarn_log_multiplier", float, 0.0) / 0.1  # stored times 0.1
    scaling = dataclasses.replace(hp.rope_scaling, log_multiplier=float(log_multiplier != 0.0))
    base, frequencies = dense_config(hp, tensors, pairing="norm", scaling=scaling)
    factor = 1.0 if scaling.kind == "none" else scaling.factor
    grown = 0.1 * math.log(factor)
    magnitude = scaling.attn_factor
    if not (scaling.kind == "yarn" and log_multiplier):
        magnitude *= 1.0 + grown
    growth = hp.get("attention.temperature_scale", float, 0.0)
    length = hp.get("attention.temperature_length", int, 0)
    if growth and length <= 0:
        raise hp.error("attention.temperature_length", f"found {length}, but the temperature scale is {growth}")
    latent = with_latent(
        hp,
        base,
        scale=(magnitude * (1.0 + log_multiplier * grown)) ** 2,
        temperature=TemperatureSpec(growth, length) if growth else None,
    )
    layers, vocabulary = _GLM_FLASH
    is_flash = hp.n_layers in layers and base.vocab_size == vocabulary
    d_ff = hp.uniform("expert_feed_forward_length")
    experts = expert_spec(
        hp,
        d_ff,
        gating=gating(hp, "sigmoid" if is_flash else "softmax"),
        **expert_weight_options(hp),
        shared=shared_expert(d_ff * hp.get("expert_shared_count", int)),
    )
    return with_experts_after_dense(hp, latent, experts), frequencies
