"""seed_oss: qwen2 whose second norm, before the MLP, goes by the name that others give a norm after attention."""

from __future__ import annotations

from oxjax.config import LayerSpec, ModelConfig
from oxjax.models.base import Frequencies, dense_config, load_layer
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.block import Layer
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    return dense_config(hp, tensors, pairing="neox")


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> Layer:
    """Block `i`."""
    norms = {"norm": "attn_norm", "mlp_norm": "post_attention_norm"}
    return load_layer(tensors, i, spec, config, norms=norms)
