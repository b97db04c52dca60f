"""granitehybrid (Granite 4): granite with Mamba-2 in place of most attention, and experts in the larger ones."""

from __future__ import annotations

from oxjax.config import LayerSpec, MLPSpec, ModelConfig
from oxjax.models.arch import mamba
from oxjax.models.base import Frequencies, model_config
from oxjax.models.experts import expert_spec, shared_expert
from oxjax.models.hybrid import attention_or_recurrent, mamba2_spec
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader

layer = mamba.layer


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; `rope.scaling.finetuned` is what says whether attention has any rotation."""
    rotates = hp.get("rope.scaling.finetuned", bool, True)
    scale = hp.get("attention.scale", float, 0.0) or None
    mixers = attention_or_recurrent(hp, mamba2_spec(hp), scale=scale, rope=0 if rotates else None)
    d_ff = hp.uniform("feed_forward_length")
    feed = MLPSpec(d_ff, "silu")
    if hp.get("expert_count", int, 0):
        feed = expert_spec(hp, d_ff, shared=shared_expert(hp.get("expert_shared_feed_forward_length", int, 0)))
    return model_config(
        hp,
        tensors,
        (LayerSpec((mixer,), feed) for mixer in mixers),
        pairing="norm" if rotates else None,
        embedding_scale=hp.get("embedding_scale", float, 0.0) or 1.0,
        residual_scale=hp.get("residual_scale", float, 0.0) or 1.0,
        logit_scale=1.0 / (hp.get("logit_scale", float, 0.0) or 1.0),
    )
