"""Builders that architectures share: config from metadata, layer from tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float

from oxjax.config import AttentionSpec, LayerSpec, MLPSpec, ModelConfig
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.block import Layer
from oxjax.models.layers.rope import RopeScaling, RopeSpec, rope_frequencies
from oxjax.models.loader import ParamLoader
from oxjax.models.mixers import MIXER_LOADERS

Frequencies = tuple[Float[np.ndarray, " _"], ...]


def rope(
    hp: Hyperparameters,
    tensors: ParamLoader,
    pairing: str,
    *,
    theta: float | None = None,
    scaling: RopeScaling | None = None,
) -> tuple[RopeSpec, Float[np.ndarray, " half"]]:
    """RoPE from the metadata and the factor tensors, with its frequencies."""
    theta = hp.rope_theta if theta is None else theta
    scaling = hp.rope_scaling if scaling is None else scaling
    inv_freq, mscale = rope_frequencies(hp.rope_dim, theta, scaling, _rope_factors(hp, tensors))
    return RopeSpec(dim=hp.rope_dim, pairing=pairing, mscale=mscale), inv_freq


def _rope_factors(hp: Hyperparameters, tensors: ParamLoader) -> np.ndarray | None:
    """Factors from `rope_freqs` (Llama 3), or the LongRoPE set for the session's context, if the file has one."""
    half = hp.rope_dim // 2
    if tensors.has("rope_freqs.weight"):
        return tensors.vector("rope_freqs.weight", half)
    names = {False: "rope_factors_short.weight", True: "rope_factors_long.weight"}
    if not all(tensors.has(n) for n in names.values()):
        return None
    factors = {is_long: tensors.vector(name, half) for is_long, name in names.items()}
    return factors[hp.max_context > hp.rope_scaling.original_context]


def model_config(
    hp: Hyperparameters,
    tensors: ParamLoader,
    layers: Iterable[LayerSpec],
    *,
    pairing: str | None = None,
    scaling: RopeScaling | None = None,
    norm: str = "rms",
    **more: Any,
) -> tuple[ModelConfig, Frequencies]:
    """Config of given layers, with one rotation or none; arguments as for `dense_config`."""
    ropes = () if pairing is None else (rope(hp, tensors, pairing, scaling=scaling),)
    config = ModelConfig(
        architecture=hp.arch,
        vocab_size=vocab_size(hp, tensors),
        d_model=hp.d_model,
        context_length=hp.context_length,
        norm_eps=hp.rms_eps if norm == "rms" else hp.layer_eps,
        layers=tuple(layers),
        ropes=tuple(spec for spec, _ in ropes),
        norm=norm,
        **more,
    )
    return config, tuple(inv_freq for _, inv_freq in ropes)


def dense_config(
    hp: Hyperparameters,
    tensors: ParamLoader,
    *,
    pairing: str | None,
    scaling: RopeScaling | None = None,
    norm: str = "rms",
    attention: Mapping[str, Any] = MappingProxyType({}),
    mlp: MLPSpec | None = None,
    parallel: bool = False,
    **more: Any,
) -> tuple[ModelConfig, Frequencies]:
    """Config of a model whose layers are all alike, with full attention and one rotation or none.

    Args:
        hp: the file's metadata.
        tensors: the file's tensors.
        pairing: of RoPE, "norm" or "neox"; None without RoPE.
        scaling: of RoPE; default from the common keys.
        norm: see `ModelConfig.norm`; its epsilon has a key of its own.
        attention: fields of `AttentionSpec` that differ from its defaults; scale is 1/sqrt(key_dim) unless given.
        mlp: the feed-forward layer; default SwiGLU.
        parallel: see `LayerSpec.parallel`.
        more: fields of `ModelConfig` that differ from its defaults.
    """
    mixer = attention_spec(hp, **({"rope": None} if pairing is None else {}), **attention)
    layer = LayerSpec((mixer,), mlp or MLPSpec(hp.uniform("feed_forward_length"), "silu"), parallel)
    return model_config(hp, tensors, (layer,) * hp.n_layers, pairing=pairing, scaling=scaling, norm=norm, **more)


def ungated_mlp(hp: Hyperparameters, activation: str = "gelu") -> MLPSpec:
    """Spec of a feed-forward layer without a gate."""
    return MLPSpec(hp.uniform("feed_forward_length"), activation, gated=False)


def replace_attention(config: ModelConfig, changes: Iterable[Mapping[str, Any]]) -> ModelConfig:
    """Config with fields of each layer's attention replaced, one mapping per layer."""
    layers = (
        dataclasses.replace(layer, mixers=(dataclasses.replace(layer.mixers[0], **change),))
        for layer, change in zip(config.layers, changes, strict=True)
    )
    return dataclasses.replace(config, layers=tuple(layers))


def with_sliding_window(
    hp: Hyperparameters,
    tensors: ParamLoader,
    config: ModelConfig,
    frequencies: Frequencies,
    slides: Iterable[bool],
    **sliding: Any,
) -> tuple[ModelConfig, Frequencies]:
    """Config with fields of the sliding layers' attention replaced.

    If the file has `rope.freq_base_swa`, these layers rotate with that base.
    """
    theta = hp.get("rope.freq_base_swa", float, hp.rope_theta)
    if theta != hp.rope_theta:
        spec, inv_freq = rope(hp, tensors, config.ropes[0].pairing, theta=theta)
        config = dataclasses.replace(config, ropes=(*config.ropes, spec))
        frequencies, sliding = (*frequencies, inv_freq), {"rope": len(config.ropes) - 1, **sliding}
    return replace_attention(config, (sliding if s else {} for s in slides)), frequencies


def attention_spec(
    hp: Hyperparameters, *, n_kv_heads: int | None = None, scale: float | None = None, **more: Any
) -> AttentionSpec:
    """Spec of one layer's attention: heads from the metadata, the rest from `more`."""
    return AttentionSpec(
        n_heads=hp.n_heads,
        n_kv_heads=hp.n_kv_heads if n_kv_heads is None else n_kv_heads,
        key_dim=hp.key_dim,
        value_dim=hp.value_dim,
        scale=1.0 / math.sqrt(hp.key_dim) if scale is None else scale,
        **more,
    )


def vocab_size(hp: Hyperparameters, tensors: ParamLoader) -> int:
    """Size of the vocabulary: `<arch>.vocab_size`, else the tokenizer's tokens, else rows of the embedding."""
    if (n := hp.get("vocab_size", int, None)) is not None:
        return n
    if (tokens := tensors.file.get_array("tokenizer.ggml.tokens", str, None)) is not None:
        return len(tokens)
    if not tensors.has("token_embd.weight"):
        raise hp.error("vocab_size", "missing, and so are tokenizer.ggml.tokens and token_embd.weight")
    return tensors.file.tensors["token_embd.weight"].shape[0]


PRE_NORMS = {"norm": "attn_norm", "mlp_norm": "ffn_norm"}
POST_NORMS = {"post_norm": "post_attention_norm", "post_mlp_norm": "post_ffw_norm"}


def load_layer(
    tensors: ParamLoader,
    i: int,
    spec: LayerSpec,
    config: ModelConfig,
    *,
    norms: Mapping[str, str] = MappingProxyType(PRE_NORMS),
    **attention: Any,
) -> Layer:
    """Load block `i`.

    Args:
        tensors: the file's tensors.
        i: number of the block.
        spec: its static facts.
        config: the model's.
        norms: fields of `Layer` and their tensors; a norm of a branch that the block does not have is not loaded.
        attention: options of `ParamLoader.attention`.
    """
    prefix, loaders = f"blk.{i}", {**MIXER_LOADERS, AttentionSpec: partial(ParamLoader.attention, **attention)}
    has = {"norm": spec.mixers, "post_norm": spec.mixers, "mlp_norm": spec.mlp, "post_mlp_norm": spec.mlp}
    return Layer(
        mixers=tuple(loaders[type(s)](tensors, prefix, s, config.d_model) for s in spec.mixers),
        mlp=None if spec.mlp is None else tensors.feed_forward(prefix, spec.mlp, config.d_model),
        **{field: tensors.norm(f"{prefix}.{name}", config.d_model) for field, name in norms.items() if has[field]},
    )
