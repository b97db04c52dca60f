"""nemotron_h_moe (Nemotron 3 Nano, Super and Puzzle): nemotron_h with a mixture in place of every MLP.

Scores are sigmoids, experts are not gated. In the larger ones the experts read and give a narrow latent, and their
widths and numbers may differ from layer to layer.
"""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.arch import nemotron_h
from oxjax.models.base import Frequencies
from oxjax.models.experts import expert_spec, expert_weight_options
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader

layer = nemotron_h.layer


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config: a mixture where `feed_forward_length` is not 0."""
    hp.ignore("expert_shared_count")  # the shared expert's width says it all
    shared = nemotron_h.plain(hp.get("expert_shared_feed_forward_length", int, 0))
    more = {"activation": "relu2", "gated": False, "gating": "sigmoid", "shared": shared, **expert_weight_options(hp)}
    more["d_latent"] = hp.get("moe_latent_size", int, 0) or None
    widths = hp.per_layer("feed_forward_length"), hp.per_layer("expert_feed_forward_length", 0)
    feeds = [
        expert_spec(hp, expert_d_ff or d_ff // max(n_used, 1), n_experts_per_token=n_used, **more) if d_ff else None
        for d_ff, expert_d_ff, n_used in zip(*widths, hp.per_layer("expert_used_count"), strict=True)
    ]
    return nemotron_h.one_thing_config(hp, tensors, feeds)
