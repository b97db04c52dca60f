"""stablelm (StableLM 1 and 2): layer norms with biases, partial half-split RoPE, SwiGLU.

The 12B size has its branches side by side on one norm, and norms every query and key head with weights of its own.
"""

from __future__ import annotations

from oxjax.config import LayerSpec, ModelConfig
from oxjax.models.base import PRE_NORMS, Frequencies, dense_config, load_layer
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.block import Layer
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; `ffn_norm` tells the two kinds of block apart, whatever `use_parallel_residual` says."""
    parallel = not tensors.has("blk.0.ffn_norm.weight")
    return dense_config(hp, tensors, pairing="neox", norm="layer", parallel=parallel)


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> Layer:
    """Block `i`."""
    norms = {"norm": "attn_norm"} if spec.parallel else PRE_NORMS
    qk_norm = "heads" if tensors.has(f"blk.{i}.attn_q_norm.weight") else None
    return load_layer(tensors, i, spec, config, norms=norms, qk_norm=qk_norm)
