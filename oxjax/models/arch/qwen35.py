"""qwen35 (Qwen 3.5, dense): qwen3next with tiled heads and one feed-forward layer instead of experts.

Its rotation has sections for images; for text all of them turn by the same position, as in plain RoPE.
"""

from __future__ import annotations

from oxjax.config import MLPSpec, ModelConfig
from oxjax.models.arch import qwen3next
from oxjax.models.base import Frequencies
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader

layer = qwen3next.layer


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    hp.ignore("rope.dimension_sections")
    return qwen3next.delta_net_config(hp, tensors, MLPSpec(hp.uniform("feed_forward_length"), "silu"), tiled=True)
