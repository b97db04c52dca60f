"""rwkv6qwen2 (QRWKV6): Qwen 2 with RWKV-6's time mixing in place of attention, without bonus and norm of heads."""

from __future__ import annotations

import dataclasses

from oxjax.config import LayerSpec, MLPSpec, ModelConfig
from oxjax.models.base import Frequencies, model_config
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader
from oxjax.models.rwkv import rwkv6_spec, rwkv_layer

layer = rwkv_layer


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; heads may share keys and values."""
    mixer = rwkv6_spec(hp, shifts=1)
    n_kv_heads = hp.get("attention.head_count_kv", int, 0) or mixer.n_kv_heads
    if n_kv_heads < 0 or mixer.n_kv_heads % n_kv_heads:
        raise hp.error("attention.head_count_kv", f"{n_kv_heads} does not divide {mixer.n_kv_heads} heads")
    feed = MLPSpec(hp.uniform("feed_forward_length"), "silu")
    layer = LayerSpec((dataclasses.replace(mixer, n_kv_heads=n_kv_heads),), feed)
    return model_config(hp, tensors, (layer,) * hp.n_layers)
