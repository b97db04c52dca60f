"""glm4 (GLM-4-0414): partial RoPE, norms before and after each branch, gate and up in one tensor.

Files of the multimodal models rotate half-split pairs by sections; for text all sections have one position.
"""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.arch import gemma2
from oxjax.models.base import Frequencies, dense_config
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader

layer = gemma2.layer


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    sections = tensors.file.get_array(hp.key("rope.dimension_sections"), int, [0, 0])
    multimodal = len(sections) > 1 and sections[0] > 0 and sections[1] > 0
    return dense_config(hp, tensors, pairing="neox" if multimodal else "norm")
