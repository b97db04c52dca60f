"""mpt: gpt2 without biases, with ALiBi or learned positions; q, k and v may be clamped, q and k normalised whole."""

from __future__ import annotations

from oxjax.config import LayerSpec, ModelConfig
from oxjax.models.base import Frequencies, dense_config, dense_layer, plain_mlp
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.transformer import TransformerLayer
from oxjax.models.layers.transformer import transformer_block as block
from oxjax.models.loader import ParamLoader

__all__ = ["block", "config", "layer"]


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
        mlp=plain_mlp(hp),
        learned_positions=tensors.has("position_embd.weight"),
    )


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> TransformerLayer:
    """Block `i`."""
    qk_norm = "whole" if tensors.has(f"blk.{i}.attn_q_norm.weight") else None
    return dense_layer(tensors, i, spec, config, qk_norm=qk_norm)
