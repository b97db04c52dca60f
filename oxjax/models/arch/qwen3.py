"""qwen3: qwen2 without biases, with an RMS norm on every query and key head before RoPE."""

from __future__ import annotations

from oxjax.config import LayerSpec, ModelConfig
from oxjax.models.arch.qwen2 import block, config
from oxjax.models.base import load_layer
from oxjax.models.layers.block import Layer
from oxjax.models.loader import ParamLoader

__all__ = ["block", "config", "layer"]


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> Layer:
    """Block `i`."""
    return load_layer(tensors, i, spec, config, qk_norm="head")
