"""nemotron_h (Nemotron-H, Nemotron Nano 2, dense): every block is one thing: Mamba-2, attention or a plain MLP.

Attention has no rotation.
"""

from __future__ import annotations

from oxjax.config import LayerSpec, MLPSpec, ModelConfig
from oxjax.models.base import Frequencies, load_layer, model_config
from oxjax.models.hybrid import attention_or, mamba2_spec
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.block import Layer, block
from oxjax.models.loader import ParamLoader

__all__ = ["block", "config", "layer"]


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config: an MLP where `feed_forward_length` is not 0, attention where it has heads."""
    mixers = attention_or(hp, mamba2_spec(hp), scale=hp.get("attention.scale", float, 0.0) or None, rope=None)
    layers = (
        LayerSpec((), MLPSpec(d_ff, "relu2", gated=False)) if d_ff else LayerSpec((mixer,))
        for mixer, d_ff in zip(mixers, hp.per_layer("feed_forward_length"), strict=True)
    )
    return model_config(hp, tensors, layers)


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> Layer:
    """Block `i`; whatever it is, its norm has the same name."""
    return load_layer(tensors, i, spec, config, norms={"norm": "attn_norm", "mlp_norm": "attn_norm"})
