"""olmo2 (OLMo 2 and 3): norms after each branch instead of before, and on all queries and all keys at once.

OLMo 3 has sliding layers; its YaRN stretches the rotation of the full ones only.
"""

from __future__ import annotations

import dataclasses

from oxjax.config import LayerSpec, ModelConfig
from oxjax.models.base import POST_NORMS, Frequencies, dense_config, load_layer, replace_attention, rope
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.block import Layer
from oxjax.models.layers.rope import RopeScaling
from oxjax.models.loader import ParamLoader

_FULL, _SLIDING = 0, 1  # indices of the two rotations


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    base, frequencies = dense_config(hp, tensors, pairing="neox")
    window = hp.get("attention.sliding_window", int, 0)
    if not window:
        return base, frequencies
    sliding, sliding_frequencies = rope(hp, tensors, "neox", scaling=RopeScaling())
    slides = hp.window_layers(default_period=4)
    varied = replace_attention(base, ({"window": window, "rope": _SLIDING} if s else {"rope": _FULL} for s in slides))
    return dataclasses.replace(varied, ropes=(*base.ropes, sliding)), (*frequencies, sliding_frequencies)


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> Layer:
    """Block `i`."""
    return load_layer(tensors, i, spec, config, norms=POST_NORMS, qk_norm="whole")
