"""nomic-bert-moe (Nomic Embed 2): nomic-bert with biases, GELU, and plain experts on every n-th layer."""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.arch import bert
from oxjax.models.base import Frequencies, ungated_mlp
from oxjax.models.experts import expert_spec, with_experts
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader

NAME = "nomic-bert-moe"
FINAL_NORM = None
layer = bert.layer


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; of `moe_every_n_layers` the second has experts."""
    base, frequencies = bert.bert_config(hp, tensors, pairing="neox", mlp=ungated_mlp(hp))
    every = hp.get("moe_every_n_layers", int, 0)
    if every <= 0:
        return base, frequencies
    experts = expert_spec(hp, hp.uniform("feed_forward_length"), activation="gelu", gated=False, norm_topk_prob=False)
    return with_experts(base, experts, lambda i: i % every == 1), frequencies
