"""rwkv6 (RWKV-6 "Finch"): time mixing with a decay per channel and row, and channel mixing; no attention."""

from __future__ import annotations

import dataclasses

from oxjax.config import LayerSpec, MLPSpec, ModelConfig
from oxjax.models.base import Frequencies, model_config
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader
from oxjax.models.rwkv import rwkv6_spec, rwkv_layer

layer = rwkv_layer


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; the weights expect residual rows that are halved after every n-th block."""
    mixer, feed = rwkv6_spec(hp, shifts=2), MLPSpec(hp.uniform("feed_forward_length"), "relu2", gated=False)
    period = hp.get("rescale_every_n_layers", int, 0)
    scales = (0.5 if period and (i + 1) % period == 0 else 1.0 for i in range(hp.n_layers))
    layers = (LayerSpec((dataclasses.replace(mixer, scale=scale),), feed) for scale in scales)
    return model_config(hp, tensors, layers, norm="layer", embedding_norm=True)
