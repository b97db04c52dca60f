"""gemma3: gemma2 with QK-norm instead of the score cap; five of six layers slide, with a rotation of their own."""

from __future__ import annotations

import dataclasses

from oxjax.config import LayerSpec, ModelConfig
from oxjax.models.arch import gemma, gemma2
from oxjax.models.base import POST_NORMS, PRE_NORMS, Frequencies, load_layer, replace_attention, rope
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.block import Layer
from oxjax.models.layers.rope import RopeScaling
from oxjax.models.loader import ParamLoader

_LAYERS_OF_27B = 62
_FULL, _SLIDING = 0, 1  # indices of the two rotations


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; sliding layers use `rope.freq_base_swa` and no scaling of positions."""
    base, (full_frequencies,) = gemma.config(hp, tensors)
    theta = hp.get("rope.freq_base_swa", float, 10000.0)
    unstretched = RopeScaling(attn_factor=hp.rope_scaling.attn_factor)
    sliding_rope, sliding_frequencies = rope(hp, tensors, "neox", theta=theta, scaling=unstretched)
    window = hp.get("attention.sliding_window", int, 0)
    scale = gemma2.query_scale(hp, _LAYERS_OF_27B)
    full = {"scale": scale, "rope": _FULL}
    sliding = {"scale": scale, "rope": _SLIDING, "window": window}
    slides = hp.window_layers(default_period=6)
    config = dataclasses.replace(
        replace_attention(base, (sliding if s and window else full for s in slides)),
        ropes=(base.ropes[0], sliding_rope),
        final_softcap=hp.get("final_logit_softcapping", float, 0.0) or None,
    )
    return config, (full_frequencies, sliding_frequencies)


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> Layer:
    """Block `i`."""
    return load_layer(tensors, i, spec, config, norms=PRE_NORMS | POST_NORMS, qk_norm="head")
