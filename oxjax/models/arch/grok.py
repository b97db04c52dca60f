"""grok (Grok 1 and 2): many multipliers and caps, norms around each branch, GELU experts, in Grok 2 beside a dense
network. The cap of the router's logits has no effect, as in llama.cpp.
"""

from __future__ import annotations

import dataclasses
import math

from oxjax.config import LayerSpec, MLPSpec, ModelConfig
from oxjax.models.base import PRE_NORMS, Frequencies, dense_config, load_layer
from oxjax.models.experts import expert_d_ff, expert_spec, with_experts
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.block import Layer
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; what old files do not state are the constants of Grok 1."""
    hp.ignore("router_logit_softcapping")
    hp.ignore("attention.temperature_length")
    is_yarn = hp.rope_scaling.kind == "yarn"
    if hp.get("rope.scaling.yarn_ext_factor", float, float(is_yarn)) not in (float(is_yarn), -1.0):
        raise hp.error("rope.scaling.yarn_ext_factor", "says other than rope.scaling.type")
    magnitude = hp.get("rope.scaling.yarn_attn_factor", float, 1.0)
    scaling = dataclasses.replace(
        hp.rope_scaling,
        beta_fast=hp.get("rope.scaling.yarn_beta_fast", float, 8.0),
        beta_slow=hp.get("rope.scaling.yarn_beta_slow", float, 1.0),
        attn_factor=hp.rope_scaling.attn_factor * (1.0 if is_yarn else magnitude),
    )
    base, frequencies = dense_config(
        hp,
        tensors,
        pairing="neox",
        scaling=scaling,
        attention={
            "scale": hp.get("attention.output_scale", float, 0.08838834764831845),
            "softcap": hp.get("attn_logit_softcapping", float, 30.0),
        },
        embedding_scale=hp.get("embedding_scale", float, 78.38367176906169),
        logit_scale=hp.get("logit_scale", float, 0.5773502691896257),
        final_softcap=hp.get("final_logit_softcapping", float, 0.0) or None,
    )
    d_ff = hp.uniform("feed_forward_length")
    dense = {}
    if tensors.has("blk.0.ffn_up.weight"):
        dense = {"shared": MLPSpec(d_ff, "gelu"), "output_scale": math.sqrt(0.5)}
    return with_experts(base, expert_spec(hp, expert_d_ff(hp, d_ff), activation="gelu", **dense)), frequencies


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> Layer:
    """Block `i`."""
    after = "layer_output_norm" if tensors.has(f"blk.{i}.layer_output_norm.weight") else "post_ffw_norm"
    norms = PRE_NORMS | {"post_norm": "attn_output_norm", "post_mlp_norm": after}
    return load_layer(tensors, i, spec, config, norms=norms)
