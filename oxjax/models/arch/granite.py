"""granite (Granite 3, dense): llama with four multipliers, of embeddings, scores, branches and logits."""

from __future__ import annotations

from oxjax.config import ModelConfig
from oxjax.models.base import Frequencies, dense_config
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; `rope.scaling.finetuned` is what says whether there is any rotation."""
    divisor = hp.get("logit_scale", float)
    if divisor == 0.0:
        raise hp.error("logit_scale", "found 0, but logits are divided by it")
    return dense_config(
        hp,
        tensors,
        pairing="norm" if hp.get("rope.scaling.finetuned", bool, True) else None,
        attention={"scale": hp.get("attention.scale", float, 0.0) or None},
        embedding_scale=hp.get("embedding_scale", float, 0.0) or 1.0,
        residual_scale=hp.get("residual_scale", float, 0.0) or 1.0,
        logit_scale=1.0 / divisor,
    )
