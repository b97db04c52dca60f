"""bloom: gpt2 with ALiBi instead of learned positions, and a norm on the token embeddings."""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.base import Frequencies, dense_config, ungated_mlp
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader

_MAX_BIAS = 8.0


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    return dense_config(
        hp,
        tensors,
        pairing=None,
        norm="layer",
        attention={"alibi": _MAX_BIAS},
        mlp=ungated_mlp(hp),
        embedding_norm=True,
    )
