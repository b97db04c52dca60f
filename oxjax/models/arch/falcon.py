"""falcon: phi2 with a full rotation and without biases. The 40B size has a second norm, for the attention."""

from __future__ import annotations

from oxjax.config import LayerSpec, ModelConfig
from oxjax.models.base import Frequencies, dense_config, load_layer, ungated_mlp
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.block import Layer
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    return dense_config(hp, tensors, pairing="neox", norm="layer", mlp=ungated_mlp(hp), parallel=True)


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> Layer:
    """Block `i`."""
    norms = {"norm": "attn_norm"}
    if tensors.has(f"blk.{i}.attn_norm_2.weight"):
        norms = {"norm": "attn_norm_2", "mlp_norm": "attn_norm"}
    return load_layer(tensors, i, spec, config, norms=norms)
