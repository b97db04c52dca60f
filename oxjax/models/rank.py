"""Heads of rerankers: from a pooled hidden state to scores of how well a document answers a query.

Two maps with an activation between them (RoBERTa, and ModernBERT with a norm more), or one of the two. What a GGUF
file means with `cls.*` is what llama.cpp makes of it, whose pooling type RANK this is.
"""

from __future__ import annotations

import jax
from flax import struct
from jaxtyping import Array, Float

from oxjax.config import ModelConfig, RankSpec
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.linear import Linear, linear
from oxjax.models.layers.mlp import ACTIVATIONS
from oxjax.models.layers.norms import Norm, norm
from oxjax.models.loader import ParamLoader

_ACTIVATIONS = {"bert": "tanh", "jina-bert-v2": "tanh", "modern-bert": "gelu", "qwen3": "tanh"}  # those with heads
_MEAN, _CLS = 1, 2  # `<arch>.classifier.pooling_type`


@struct.dataclass
class RankHead:
    """A head's numbers: `dense` and its `norm`, or `output`, or all.

    Attributes:
        dense: `[d_model, d_model]` before `output`, else `[d_model, labels]`; the activation follows it.
        norm: after the activation.
        output: `[d_model, labels]`.
    """

    dense: Linear | None
    norm: Norm | None
    output: Linear | None


def rank_spec(hp: Hyperparameters, tensors: ParamLoader, *, causal: bool) -> RankSpec | None:
    """Metadata to the facts of the head; None where the file has none or its architecture has no place for one."""
    if hp.arch not in _ACTIVATIONS or not (tensors.has("cls.weight") or tensors.has("cls.output.weight")):
        return None
    labels = hp.file.get_array(hp.key("classifier.output_labels"), str, None)
    pooling = hp.get("classifier.pooling_type", int, _MEAN if hp.arch == "modern-bert" else _CLS)
    if pooling not in (_MEAN, _CLS):
        raise hp.error("classifier.pooling_type", f"found {pooling}, expected {_MEAN} (mean) or {_CLS} (cls)")
    return RankSpec(
        n_labels=len(labels) if labels else 1,
        pooling="mean" if pooling == _MEAN else "last" if causal else "cls",
        activation=_ACTIVATIONS[hp.arch],
        softmax=hp.arch == "qwen3",
    )


def load_head(tensors: ParamLoader, config: ModelConfig) -> RankHead | None:
    """The tensors `cls.*`."""
    if config.rank is None:
        return None
    d, n = config.d_model, config.rank.n_labels
    dense, norm, output = (tensors.has(f"cls{part}.weight") for part in ("", ".norm", ".output"))
    return RankHead(
        dense=tensors.linear("cls", d, d if output else n, keep=output) if dense else None,
        norm=tensors.norm("cls.norm", d) if dense and norm else None,
        output=tensors.linear("cls.output", d, n, keep=False) if output else None,  # small, and it decides
    )


def rank_scores(p: RankHead, x: Float[Array, "rows d_model"], config: ModelConfig) -> Float[Array, "rows labels"]:
    """Scores of pooled hidden states, one for each label. Pure; jit it with `config` static.

    In exact mode the bits of a row depend on that row alone, for a given number of rows.
    """
    if p.dense is not None:
        x = ACTIVATIONS[config.rank.activation](linear(p.dense, x, config.numerics))
    if p.norm is not None:
        x = norm(p.norm, x, config)
    if p.output is not None:
        x = linear(p.output, x, config.numerics)
    return jax.nn.softmax(x, axis=-1) if config.rank.softmax else x
