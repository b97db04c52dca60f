"""mpt: gpt2 with ALiBi, learned positions or both, mostly without biases; q, k and v may be clamped."""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.base import Frequencies, dense_config, ungated_mlp
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    attention = {
        "alibi": hp.get("attention.max_alibi_bias", float, 0.0) or None,
        "clamp": hp.get("attention.clamp_kqv", float, 0.0) or None,
    }
    return dense_config(
        hp,
        tensors,
        pairing=None,
        norm="layer",
        attention=attention,
        mlp=ungated_mlp(hp),
        learned_positions=tensors.has("position_embd.weight"),
    )
