"""t5 (T5, Flan-T5): its encoder; the decoder, which would write a text of its own from it, is left out."""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.arch import t5encoder
from oxjax.models.base import Frequencies
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader

FINAL_NORM = "enc.output_norm"
layer = t5encoder.layer


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    for key in ("decoder_start_token_id", "decoder_block_count"):
        hp.ignore(key)
    tensors.skip("dec.")
    return t5encoder.config(hp, tensors)
