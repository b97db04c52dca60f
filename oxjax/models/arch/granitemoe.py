"""granitemoe (Granite 3 with experts): granite with a mixture on every layer."""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.arch import granite
from oxjax.models.base import Frequencies
from oxjax.models.experts import expert_spec, shared_expert, with_experts
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    base, frequencies = granite.config(hp, tensors)
    shared = shared_expert(hp.get("expert_shared_feed_forward_length", int, 0))
    return with_experts(base, expert_spec(hp, hp.uniform("feed_forward_length"), shared=shared)), frequencies
