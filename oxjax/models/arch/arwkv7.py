"""arwkv7 (ARWKV): Qwen 2 with RWKV-7's time mixing in place of attention; gates and norms of heads may be missing."""

from __future__ import annotations

from oxjax.config import MLPSpec, ModelConfig
from oxjax.models.base import Frequencies
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader
from oxjax.models.rwkv import rwkv7_config, rwkv_layer

layer = rwkv_layer


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    return rwkv7_config(hp, tensors, 1, MLPSpec(hp.uniform("feed_forward_length"), "silu"))
