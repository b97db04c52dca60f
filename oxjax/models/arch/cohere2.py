"""cohere2 (Command R7B, Command A): command-r whose sliding layers rotate and whose full ones know no positions."""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.arch import command_r
from oxjax.models.base import Frequencies, replace_attention
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader

layer = command_r.layer


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; every fourth layer is full unless the file has another pattern."""
    base, frequencies = command_r.config(hp, tensors)
    window = hp.get("attention.sliding_window", int)
    slides = hp.window_layers(default_period=4)
    return replace_attention(base, ({"window": window} if s else {"rope": None} for s in slides)), frequencies
