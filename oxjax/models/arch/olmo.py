"""olmo (OLMo 1): llama with layer norms that have no parameters; q, k and v may be clamped."""

from __future__ import annotations

from oxjax.config import LayerSpec, ModelConfig
from oxjax.models.base import Frequencies, dense_config, load_layer
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.block import Layer
from oxjax.models.layers.norms import Norm
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    clamp = hp.get("attention.clamp_kqv", float, 0.0) or None
    return dense_config(hp, tensors, pairing="norm", norm="layer", norm_weights=False, attention={"clamp": clamp})


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> Layer:
    """Block `i`."""
    return load_layer(tensors, i, spec, config, norms={}).replace(norm=Norm(), mlp_norm=Norm())
