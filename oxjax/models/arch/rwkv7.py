"""rwkv7 (RWKV-7 "Goose"): time mixing that rewrites its state, and channel mixing; no attention."""

from __future__ import annotations

from oxjax.config import MLPSpec, ModelConfig
from oxjax.models.base import Frequencies
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader
from oxjax.models.rwkv import rwkv7_config, rwkv_layer

layer = rwkv_layer


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    feed = MLPSpec(hp.uniform("feed_forward_length"), "relu2", gated=False)
    return rwkv7_config(hp, tensors, 2, feed, norm="layer", embedding_norm=True)
