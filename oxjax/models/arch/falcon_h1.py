"""falcon-h1: attention and Mamba-2 side by side in every block; its multipliers lie in the weights."""

from __future__ import annotations

from oxjax.config import LayerSpec, MLPSpec, ModelConfig
from oxjax.models.base import Frequencies, attention_spec, load_layer, model_config
from oxjax.models.hybrid import mamba2_spec
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.block import Layer
from oxjax.models.loader import ParamLoader

NAME = "falcon-h1"


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    mixers = (attention_spec(hp), mamba2_spec(hp))
    layer = LayerSpec(mixers, MLPSpec(hp.uniform("feed_forward_length"), "silu"))
    return model_config(hp, tensors, (layer,) * hp.n_layers, pairing="neox")


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> Layer:
    """Block `i`; the tensor of its second norm has no `.weight` in its name."""
    return load_layer(tensors, i, spec, config)
