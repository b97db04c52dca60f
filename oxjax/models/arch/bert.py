"""bert (BERT, MiniLM, BGE, E5, RoBERTa-likes): norms after each branch, learned positions, GELU, biases everywhere."""

from __future__ import annotations

from typing import Any

from oxjax.config import LayerSpec, MLPSpec, ModelConfig
from oxjax.models.base import Frequencies, dense_config, ungated_mlp
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.encoder import EncoderLayer
from oxjax.models.loader import ParamLoader

FINAL_NORM = None


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    return bert_config(hp, tensors, mlp=ungated_mlp(hp), learned_positions=True)


def bert_config(
    hp: Hyperparameters, tensors: ParamLoader, *, mlp: MLPSpec, pairing: str | None = None, **more: Any
) -> tuple[ModelConfig, Frequencies]:
    """The config of BERT and those after it; see `dense_config`. `attention.causal` has no say, as in llama.cpp."""
    hp.ignore("attention.causal")
    return dense_config(hp, tensors, pairing=pairing, norm="layer", mlp=mlp, causal=False, embedding_norm=True, **more)


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> EncoderLayer:
    """Block `i`."""
    prefix, d = f"blk.{i}", config.d_model
    return EncoderLayer(
        attn=tensors.attention(prefix, spec.mixers[0], d),
        mlp=tensors.feed_forward(prefix, spec.mlp, d),
        attn_out_norm=tensors.norm(f"{prefix}.attn_output_norm", d),
        mlp_out_norm=tensors.norm(f"{prefix}.layer_output_norm", d),
    )
