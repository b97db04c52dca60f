"""gptneox (GPT-NeoX, Pythia, Dolly): partial half-split RoPE; branches side by side, each behind a norm of its own."""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.base import Frequencies, dense_config, ungated_mlp
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; some models of the family run their branches one after the other."""
    parallel = hp.get("use_parallel_residual", bool)
    return dense_config(hp, tensors, pairing="neox", norm="layer", mlp=ungated_mlp(hp), parallel=parallel)
