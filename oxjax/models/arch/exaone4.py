"""exaone4: norms after each branch instead of before, and on every query and key head.

The 32B size, which only its depth tells, has sliding layers; there the full ones know no positions.
"""

from __future__ import annotations

from oxjax.config import LayerSpec, ModelConfig
from oxjax.models.base import POST_NORMS, Frequencies, dense_config, load_layer, replace_attention
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.block import Layer
from oxjax.models.loader import ParamLoader

_LAYERS_OF_32B = 64


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; in the 32B size every fourth layer is full unless the file has another pattern."""
    base, frequencies = dense_config(hp, tensors, pairing="neox")
    window = hp.get("attention.sliding_window", int, 4096)
    slides = hp.window_layers(default_period=4)
    if hp.n_layers != _LAYERS_OF_32B:
        return base, frequencies
    return replace_attention(base, ({"window": window} if s else {"rope": None} for s in slides)), frequencies


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> Layer:
    """Block `i`."""
    return load_layer(tensors, i, spec, config, norms=POST_NORMS, qk_norm="head")
