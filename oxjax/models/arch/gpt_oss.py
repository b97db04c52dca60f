"""gpt-oss: every other layer slides, heads have sinks, and all layers mix experts whose maps have biases.

The norm before the experts is named after attention. Its activation is `layers.mlp.gated`'s "swiglu_oai".
"""

from __future__ import annotations

from oxjax.config import LayerSpec, ModelConfig
from oxjax.models.base import Frequencies, dense_config, load_layer, with_sliding_window
from oxjax.models.experts import expert_d_ff, expert_spec, with_experts
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.block import Layer
from oxjax.models.loader import ParamLoader

NAME = "gpt-oss"


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; sliding layers may have a base of their own, `rope.freq_base_swa`."""
    base, frequencies = with_sliding_window(
        hp,
        tensors,
        *dense_config(hp, tensors, pairing="neox", attention={"sinks": True}),
        hp.window_layers(default_period=2),
        window=hp.uniform("attention.sliding_window"),
    )
    experts = expert_spec(hp, expert_d_ff(hp, 0), activation="swiglu_oai", gating="softmax_topk", norm_topk_prob=False)
    return with_experts(base, experts), frequencies


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> Layer:
    """Block `i`."""
    norms = {"norm": "attn_norm", "mlp_norm": "post_attention_norm"}
    return load_layer(tensors, i, spec, config, norms=norms)
