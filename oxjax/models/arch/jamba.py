"""jamba: Mamba layers with a few of attention between them, which have no rotation; experts on some layers."""

from __future__ import annotations

from oxjax.config import LayerSpec, MLPSpec, ModelConfig
from oxjax.models.arch import mamba
from oxjax.models.base import Frequencies, model_config
from oxjax.models.experts import expert_spec
from oxjax.models.hybrid import attention_or_recurrent, mamba_spec
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader

layer = mamba.layer


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; a layer has experts where the file has a router for it."""
    d_ff = hp.uniform("feed_forward_length")
    dense = MLPSpec(d_ff, "silu")
    mixers = attention_or_recurrent(hp, mamba_spec(hp, low_norm="learned"), rope=None)
    feeds = [dense] * hp.n_layers
    if hp.get("expert_count", int, 0):
        experts = expert_spec(hp, d_ff, norm_topk_prob=False)
        feeds = [experts if tensors.has(f"blk.{i}.ffn_gate_inp.weight") else dense for i in range(hp.n_layers)]
    return model_config(hp, tensors, (LayerSpec((m,), f) for m, f in zip(mixers, feeds, strict=True)))
