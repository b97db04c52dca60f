"""baichuan (Baichuan 1 and 2): llama in the 7B size, with ALiBi instead of RoPE in the 13B one.

Only the depth tells them apart. llama.cpp gives any other depth no positions at all, and so do we.
"""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.base import Frequencies, dense_config
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader

_LAYERS_OF_7B, _LAYERS_OF_13B = 32, 40
_MAX_BIAS = 8.0


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    alibi = _MAX_BIAS if hp.n_layers == _LAYERS_OF_13B else None
    pairing = "norm" if hp.n_layers == _LAYERS_OF_7B else None
    return dense_config(hp, tensors, pairing=pairing, attention={"alibi": alibi})
