"""dbrx: layer norms without biases, clamped q, k and v, a mixture on every layer."""

from __future__ import annotations

from oxjax.config import LayerSpec, ModelConfig
from oxjax.models.base import Frequencies, dense_config, load_layer
from oxjax.models.experts import expert_spec, with_experts
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.block import Layer
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    clamp = hp.get("attention.clamp_kqv", float)
    base, frequencies = dense_config(
        hp, tensors, pairing="neox", norm="layer", attention={"clamp": clamp if clamp > 0.0 else None}
    )
    return with_experts(base, expert_spec(hp, hp.uniform("feed_forward_length"))), frequencies


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> Layer:
    """Block `i`."""
    norms = {"norm": "attn_norm", "mlp_norm": "attn_output_norm"}
    return load_layer(tensors, i, spec, config, norms=norms)
