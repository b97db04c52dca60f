"""modern-bert (ModernBERT, GTE, Granite Embedding 2): norms before each branch, RoPE, GeGLU, no biases.

Of three layers one sees the whole text, the first of each; the others see a window to both sides, with a rotation
of their own.
"""

from __future__ import annotations

import dataclasses

from oxjax.config import LayerSpec, MLPSpec, ModelConfig
from oxjax.models.arch.bert import bert_config
from oxjax.models.base import Frequencies, replace_attention, rope
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.encoder import EncoderLayer
from oxjax.models.layers.rope import RopeScaling
from oxjax.models.loader import ParamLoader

NAME = "modern-bert"


_FULL, _SLIDING = 0, 1  # indices of the two rotations
_ACTIVATIONS = {"gelu": "gelu", "geglu": "gelu", "silu": "silu", "swish": "silu", "swiglu": "silu", "reglu": "relu"}


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config."""
    activation = hp.get("hidden_activation", str, "gelu")
    if activation not in _ACTIVATIONS:
        raise hp.error("hidden_activation", f"found {activation!r}, expected one of {', '.join(_ACTIVATIONS)}")
    mlp = MLPSpec(hp.uniform("feed_forward_length"), _ACTIVATIONS[activation])
    base, (full_frequencies,) = bert_config(hp, tensors, pairing="neox", mlp=mlp)
    window = hp.get("attention.sliding_window", int, 0)
    if not window:
        return base, (full_frequencies,)
    theta = hp.get("rope.freq_base_swa", float, 10000.0)
    unstretched = RopeScaling(attn_factor=hp.rope_scaling.attn_factor)
    sliding, frequencies = rope(hp, tensors, "neox", theta=theta, scaling=unstretched)
    slides = hp.window_layers(default_period=3, full_first=True)
    varied = replace_attention(base, ({"rope": _SLIDING, "window": window} if s else {"rope": _FULL} for s in slides))
    return dataclasses.replace(varied, ropes=(*base.ropes, sliding)), (full_frequencies, frequencies)


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> EncoderLayer:
    """Block `i`; the first one reads the embeddings' norm as it is."""
    prefix, d = f"blk.{i}", config.d_model
    bare = i == 0 and not tensors.has(f"{prefix}.attn_norm.weight")
    return EncoderLayer(
        attn=tensors.attention(prefix, spec.mixers[0], d),
        mlp=tensors.mlp(prefix, spec.mlp, d),
        attn_norm=None if bare else tensors.norm(f"{prefix}.attn_norm", d),
        mlp_norm=tensors.norm(f"{prefix}.ffn_norm", d),
    )
