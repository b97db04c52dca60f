"""mamba2 (Mamba-2, Mamba-Codestral): blocks of Mamba-2 and nothing else."""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.arch import mamba
from oxjax.models.base import Frequencies
from oxjax.models.hybrid import mamba2_spec
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader

layer = mamba.layer


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    return mamba.mixer_only_config(hp, tensors, mamba2_spec(hp))
