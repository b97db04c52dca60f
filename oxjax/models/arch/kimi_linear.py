"""kimi-linear (Kimi Linear 48B-A3B): three layers of Kimi Delta Attention to one of latent attention, which rotates
nothing; experts after some dense layers.
"""

from __future__ import annotations

from oxjax.config import LayerSpec, MLPSpec, ModelConfig
from oxjax.models.base import Frequencies, model_config
from oxjax.models.experts import expert_spec, gating, shared_expert, with_experts_after_dense
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.latent import latent_spec
from oxjax.models.layers.kimi_delta import KimiDeltaSpec
from oxjax.models.loader import ParamLoader

NAME = "kimi-linear"


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; only layers of latent attention have heads of keys and values."""
    head_dim = hp.uniform("kda.head_dim")
    window = (hp.uniform("ssm.conv_kernel") - 1, 3 * hp.n_heads * head_dim)
    delta, latent = KimiDeltaSpec(conv=window, ssm=(hp.n_heads, head_dim, head_dim)), latent_spec(hp, rope=None)
    feed = MLPSpec(hp.uniform("feed_forward_length"), "silu")
    mixers = (latent if n else delta for n in hp.per_layer("attention.head_count_kv"))
    base, frequencies = model_config(hp, tensors, (LayerSpec((mixer,), feed) for mixer in mixers))
    d_ff = hp.uniform("expert_feed_forward_length")
    experts = expert_spec(
        hp,
        d_ff,
        gating=gating(hp, "sigmoid"),
        scale=hp.get("expert_weights_scale", float, 0.0) or 1.0,
        shared=shared_expert(d_ff * hp.get("expert_shared_count", int)),
    )
    return with_experts_after_dense(hp, base, experts), frequencies
