"""falcon: phi2 with a full rotation and without biases. The 40B size has a second norm, for the attention."""

from __future__ import annotations

from oxjax.config import LayerSpec, ModelConfig
from oxjax.models.arch.phi2 import block, config
from oxjax.models.base import load_layer
from oxjax.models.layers.block import Layer
from oxjax.models.loader import ParamLoader

__all__ = ["block", "config", "layer"]


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> Layer:
    """Block `i`."""
    norms = {"norm": "attn_norm"}
    if tensors.has(f"blk.{i}.attn_norm_2.weight"):
        norms = {"norm": "attn_norm_2", "mlp_norm": "attn_norm"}
    return load_layer(tensors, i, spec, config, norms=norms)
