"""command-r (Cohere): layer norms without biases, both SwiGLU and attention on one norm, scaled logits.

Command R+ also normalises every query and key head, each with weights of its own.
"""

from __future__ import annotations

from oxjax.config import LayerSpec, ModelConfig
from oxjax.models.base import Frequencies, dense_config, load_layer
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.block import Layer
from oxjax.models.loader import ParamLoader

NAME = "command-r"


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    return dense_config(
        hp,
        tensors,
        pairing="norm",
        norm="layer",
        parallel=True,
        logit_scale=hp.get("logit_scale", float, 0.0) or 1.0,
    )


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> Layer:
    """Block `i`."""
    qk_norm = "heads" if tensors.has(f"blk.{i}.attn_q_norm.weight") else None
    return load_layer(tensors, i, spec, config, norms={"norm": "attn_norm"}, qk_norm=qk_norm)
