"""gemma2: gemma with norms after each branch too, soft caps on scores and logits, and every other layer sliding."""

from __future__ import annotations

import dataclasses
import math

from oxjax.config import LayerSpec, ModelConfig
from oxjax.models.arch import gemma
from oxjax.models.base import POST_NORMS, PRE_NORMS, Frequencies, load_layer, replace_attention
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.block import Layer
from oxjax.models.loader import ParamLoader

_LAYERS_OF_27B = 46  # the one size whose queries are scaled by d_model / n_heads instead of the head dimension


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    base, frequencies = gemma.config(hp, tensors)
    window = hp.get("attention.sliding_window", int, 4096)
    common = {
        "scale": query_scale(hp, _LAYERS_OF_27B),
        "softcap": hp.get("attn_logit_softcapping", float, 50.0) or None,
    }
    slides = hp.window_layers(default_period=2)
    varied = replace_attention(base, ({**common, "window": window if s else None} for s in slides))
    final = hp.get("final_logit_softcapping", float, 30.0)
    return dataclasses.replace(varied, final_softcap=final or None), frequencies


def query_scale(hp: Hyperparameters, layers_of_27b: int) -> float:
    """1/sqrt(key_dim), but 1/sqrt(d_model / n_heads) for the 27B model, which only its depth tells apart."""
    return 1.0 / math.sqrt(hp.d_model / hp.n_heads if hp.n_layers == layers_of_27b else hp.key_dim)


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> Layer:
    """Block `i`."""
    return load_layer(tensors, i, spec, config, norms=PRE_NORMS | POST_NORMS)
