"""plamo2: PLaMo 2's Mamba with attention between, and norms before and after every branch.

Its converter says 0 heads where a block has no attention. llama.cpp takes the width of the rotation from the first
block; where that one has no heads it rotates nothing, and later versions never return from that. We rotate what the
model was trained with, as llama.cpp does where the first block has heads.
"""

from __future__ import annotations

from oxjax.config import LayerSpec, MLPSpec, ModelConfig
from oxjax.models.base import POST_NORMS, PRE_NORMS, Frequencies, load_layer, model_config
from oxjax.models.hybrid import attention_or_recurrent, plamo_mamba_spec
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.block import Layer
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; only attention layers have heads."""
    mixers = attention_or_recurrent(hp, plamo_mamba_spec(hp), scale=hp.value_dim**-0.5)
    feed = MLPSpec(hp.uniform("feed_forward_length"), "silu")
    return model_config(hp, tensors, (LayerSpec((m,), feed) for m in mixers), pairing="neox")


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> Layer:
    """Block `i`."""
    return load_layer(tensors, i, spec, config, norms=PRE_NORMS | POST_NORMS, qk_norm="heads")
