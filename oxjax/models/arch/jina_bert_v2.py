"""jina-bert-v2 (Jina Embeddings 2): bert with ALiBi instead of positions and, in most files, a gated MLP.

The code models norm whole projections of queries and keys, and take the block's input in twice.
"""

from __future__ import annotations

from oxjax.config import LayerSpec, MLPSpec, ModelConfig
from oxjax.models.arch import bert
from oxjax.models.base import Frequencies
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.encoder import EncoderLayer
from oxjax.models.loader import ParamLoader

NAME = "jina-bert-v2"
FINAL_NORM = None

_MAX_ALIBI_BIAS = 8.0


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; the gate is a tensor of its own, or the first half of `ffn_up`, or not there."""
    d_ff = hp.uniform("feed_forward_length")
    up = tensors.file.tensors.get("blk.0.ffn_up.weight")
    gated = tensors.has("blk.0.ffn_gate.weight") or (up is not None and up.shape[0] == 2 * d_ff)
    attention = {"alibi": _MAX_ALIBI_BIAS}
    return bert.bert_config(hp, tensors, mlp=MLPSpec(d_ff, "gelu", gated=gated), attention=attention)


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> EncoderLayer:
    """Block `i`."""
    block, d, prefix = bert.layer(tensors, i, spec, config), config.d_model, f"blk.{i}"

    def norm(name: str) -> object:
        return tensors.norm(f"{prefix}.{name}", d) if tensors.has(f"{prefix}.{name}.weight") else None

    attn = block.attn.replace(q_norm=norm("attn_q_norm"), k_norm=norm("attn_k_norm"))
    return block.replace(attn=attn, attn_norm_2=norm("attn_norm_2"))
