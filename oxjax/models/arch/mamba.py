"""mamba (Mamba, FalconMamba): blocks of a selective state-space model and nothing else."""

from __future__ import annotations

from oxjax.config import LayerSpec, MixerSpec, ModelConfig
from oxjax.models.base import Frequencies, load_layer, model_config
from oxjax.models.hybrid import mamba_spec
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.block import Layer
from oxjax.models.loader import ParamLoader


def mixer_only_config(hp: Hyperparameters, tensors: ParamLoader, mixer: MixerSpec) -> tuple[ModelConfig, Frequencies]:
    """Config of a model whose blocks are one mixer without a feed-forward layer."""
    for key in ("attention.head_count", "feed_forward_length"):
        if found := hp.get(key, int, 0):
            raise hp.error(key, f"found {found}, but {hp.arch} has none")
    return model_config(hp, tensors, (LayerSpec((mixer,)),) * hp.n_layers)


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; `ssm.dt_b_c_rms` is FalconMamba's."""
    spec = mamba_spec(hp, low_norm="unit" if hp.get("ssm.dt_b_c_rms", bool, False) else None)
    return mixer_only_config(hp, tensors, spec)


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> Layer:
    """Block `i`."""
    return load_layer(tensors, i, spec, config)
