"""qwen3next: three layers of Gated DeltaNet to one of gated attention, partial RoPE, experts everywhere."""

from __future__ import annotations

from oxjax.config import LayerSpec, MLPSpec, ModelConfig, MoESpec
from oxjax.models.base import Frequencies, attention_spec, load_layer, model_config
from oxjax.models.experts import expert_spec, shared_expert
from oxjax.models.hybrid import delta_net_spec
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.block import Layer
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    return delta_net_config(hp, tensors, experts(hp), tiled=False)


def experts(hp: Hyperparameters) -> MoESpec:
    """The experts of every layer."""
    dense = hp.get("feed_forward_length", int, 0)  # stands in for what is missing
    d_ff = hp.get("expert_feed_forward_length", int, 0) or dense // hp.uniform("expert_used_count")
    shared = hp.get("expert_shared_feed_forward_length", int, 0) or dense
    return expert_spec(hp, d_ff, shared=shared_expert(shared))


def delta_net_config(
    hp: Hyperparameters, tensors: ParamLoader, feed: MLPSpec | MoESpec, *, tiled: bool
) -> tuple[ModelConfig, Frequencies]:
    """DeltaNet and attention as `attention.recurrent_layers` says, else attention on every n-th layer."""
    attention, recurrent = attention_spec(hp), delta_net_spec(hp, tiled=tiled)
    layers = (LayerSpec((recurrent if r else attention,), feed) for r in _recurrent_layers(hp))
    return model_config(hp, tensors, layers, pairing="neox")


def _recurrent_layers(hp: Hyperparameters) -> tuple[bool, ...]:
    key = hp.key("attention.recurrent_layers")
    if key in hp.file.metadata:
        flags = hp.file.get_array(key, bool)
        if len(flags) < hp.n_layers:
            raise hp.error("attention.recurrent_layers", f"has {len(flags)} entries for {hp.n_layers} layers")
        return tuple(bool(f) for f in flags[: hp.n_layers])
    period = hp.uniform("full_attention_interval", 4)
    return tuple((i + 1) % period != 0 for i in range(hp.n_layers))


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> Layer:
    """Block `i`; what is named the norm after attention is the one before the feed-forward layer."""
    norms = {"norm": "attn_norm", "mlp_norm": "post_attention_norm"}
    return load_layer(tensors, i, spec, config, norms=norms, qk_norm="head", gated=True)
