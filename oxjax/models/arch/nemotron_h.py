"""nemotron_h (Nemotron-H, Nemotron Nano 2, dense): every block is one thing: Mamba-2, attention or a plain MLP.

Attention has no rotation.
"""

from __future__ import annotations

from collections.abc import Sequence

from oxjax.config import LayerSpec, MLPSpec, ModelConfig, MoESpec
from oxjax.models.base import Frequencies, load_layer, model_config
from oxjax.models.hybrid import attention_or_recurrent, mamba2_spec
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.block import Layer
from oxjax.models.loader import ParamLoader


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    return one_thing_config(hp, tensors, [plain(d_ff) for d_ff in hp.per_layer("feed_forward_length")])


def plain(d_ff: int) -> MLPSpec | None:
    """A feed-forward layer of this width; None for 0."""
    return MLPSpec(d_ff, "relu2", gated=False) if d_ff else None


def one_thing_config(
    hp: Hyperparameters, tensors: ParamLoader, feeds: Sequence[MLPSpec | MoESpec | None]
) -> tuple[ModelConfig, Frequencies]:
    """The config of blocks that are a feed-forward layer where there is one, else attention where it has heads."""
    mixers = attention_or_recurrent(hp, mamba2_spec(hp), rope=None)
    layers = (LayerSpec((), feed) if feed else LayerSpec((mixer,)) for mixer, feed in zip(mixers, feeds, strict=True))
    return model_config(hp, tensors, layers)


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> Layer:
    """Block `i`; whatever it is, its norm has the same name."""
    return load_layer(tensors, i, spec, config, norms={"norm": "attn_norm", "mlp_norm": "attn_norm"})
