"""glm4moe (GLM 4.5 to 4.7): partial RoPE, norms of queries and keys in the large one, experts after some dense
layers. The norm before the feed-forward layer is named after attention.
"""

from __future__ import annotations

from oxjax.config import LayerSpec, ModelConfig
from oxjax.models.base import Frequencies, dense_config, load_layer
from oxjax.models.experts import expert_spec, expert_weight_options, gating, shared_expert, with_experts_after_dense
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.block import Layer
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; rotations by sections are, for text, the same rotation."""
    hp.ignore("rope.dimension_sections")
    base, frequencies = dense_config(hp, tensors, pairing="neox")
    d_ff = hp.uniform("expert_feed_forward_length")
    experts = expert_spec(
        hp,
        d_ff,
        gating=gating(hp, "sigmoid"),
        **expert_weight_options(hp),
        shared=shared_expert(d_ff * hp.get("expert_shared_count", int)),
    )
    return with_experts_after_dense(hp, base, experts), frequencies


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> Layer:
    """Block `i`."""
    norms = {"norm": "attn_norm", "mlp_norm": "post_attention_norm"}
    qk_norm = "head" if tensors.has(f"blk.{i}.attn_q_norm.weight") else None
    return load_layer(tensors, i, spec, config, norms=norms, qk_norm=qk_norm)
