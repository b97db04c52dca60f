"""lfm2 (LFM2, dense): short convolutions with a few layers of attention between them."""

from __future__ import annotations

from oxjax.config import LayerSpec, MLPSpec, ModelConfig
from oxjax.models.base import Frequencies, load_layer, model_config
from oxjax.models.hybrid import attention_or_recurrent
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.block import Layer
from oxjax.models.layers.short_conv import ShortConvSpec
from oxjax.models.loader import ParamLoader

FINAL_NORM = "token_embd_norm"  # where its files have the norm before the logits


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; only attention layers have heads of keys and values."""
    conv = ShortConvSpec(conv=(hp.uniform("shortconv.l_cache") - 1, hp.d_model), ssm=(0,))
    window = hp.get("attention.sliding_window", int, 0) or None
    feed = MLPSpec(hp.uniform("feed_forward_length"), "silu")
    layers = (LayerSpec((mixer,), feed) for mixer in attention_or_recurrent(hp, conv, window=window))
    return model_config(hp, tensors, layers, pairing="neox")


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> Layer:
    """Block `i`."""
    return load_layer(tensors, i, spec, config, qk_norm="head")
