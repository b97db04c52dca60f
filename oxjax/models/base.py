"""What architectures share when they turn metadata into a config and tensors into a layer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float

from oxjax.config import AttentionSpec, LayerSpec, MLPSpec, ModelConfig
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.rope import RopeScaling, RopeSpec, rope_frequencies
from oxjax.models.layers.transformer import TransformerLayer
from oxjax.models.loader import ParamLoader

Frequencies = tuple[Float[np.ndarray, " _"], ...]


def rope(
    hp: Hyperparameters,
    tensors: ParamLoader,
    pairing: str,
    *,
    theta: float | None = None,
    scaling: RopeScaling | None = None,
) -> tuple[RopeSpec, Float[np.ndarray, " half"]]:
    """The rotation that the metadata and the factor tensors describe, with its frequencies."""
    theta = hp.rope_theta if theta is None else theta
    scaling = hp.rope_scaling if scaling is None else scaling
    inv_freq, mscale = rope_frequencies(hp.rope_dim, theta, scaling, _rope_factors(hp, tensors))
    return RopeSpec(dim=hp.rope_dim, pairing=pairing, mscale=mscale), inv_freq


def _rope_factors(hp: Hyperparameters, tensors: ParamLoader) -> np.ndarray | None:
    """`rope_freqs` (Llama 3), or the LongRoPE set that suits the session's context, whichever is there."""
    half = hp.rope_dim // 2
    if tensors.has("rope_freqs.weight"):
        return tensors.vector("rope_freqs.weight", half)
    names = {False: "rope_factors_short.weight", True: "rope_factors_long.weight"}
    if not all(tensors.has(n) for n in names.values()):
        return None
    factors = {is_long: tensors.vector(name, half) for is_long, name in names.items()}
    return factors[hp.max_context > hp.rope_scaling.original_context]


def dense_config(
    hp: Hyperparameters,
    tensors: ParamLoader,
    *,
    pairing: str,
    activation: str = "silu",
    embedding_scale: float = 1.0,
    scale: float | None = None,
) -> tuple[ModelConfig, Frequencies]:
    """The config of a model whose layers are all alike: full attention, one rotation, RMS norms.

    Args:
        hp: the file's metadata.
        tensors: the file's tensors.
        pairing: of RoPE, "norm" or "neox".
        activation: of the feed-forward gate.
        embedding_scale: multiplier of token embeddings.
        scale: multiplier of attention scores; one over the root of the head dimension unless given.
    """
    spec, inv_freq = rope(hp, tensors, pairing)
    mixer = attention_spec(hp, scale=1.0 / math.sqrt(hp.key_dim) if scale is None else scale)
    layer = LayerSpec((mixer,), MLPSpec(hp.uniform("feed_forward_length"), activation))
    config = ModelConfig(
        architecture=hp.arch,
        vocab_size=vocab_size(hp, tensors),
        d_model=hp.d_model,
        context_length=hp.context_length,
        norm_eps=hp.rms_eps,
        layers=(layer,) * hp.n_layers,
        ropes=(spec,),
        embedding_scale=embedding_scale,
    )
    return config, (inv_freq,)


def attention_spec(hp: Hyperparameters, **more: Any) -> AttentionSpec:
    """One layer's attention, with what the heads are from the metadata and the rest given."""
    return AttentionSpec(
        n_heads=hp.n_heads, n_kv_heads=hp.n_kv_heads, key_dim=hp.key_dim, value_dim=hp.value_dim, **more
    )


def vocab_size(hp: Hyperparameters, tensors: ParamLoader) -> int:
    """`<arch>.vocab_size`, else as many tokens as the tokenizer lists, else rows of the embedding."""
    if (n := hp.get("vocab_size", int, None)) is not None:
        return n
    if (tokens := tensors.file.get_array("tokenizer.ggml.tokens", str, None)) is not None:
        return len(tokens)
    if not tensors.has("token_embd.weight"):
        raise hp.error("vocab_size", "missing, and so are tokenizer.ggml.tokens and token_embd.weight")
    return tensors.file.tensors["token_embd.weight"].shape[0]


def pre_norm_layer(
    tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig, *, qk_norm: bool = False
) -> TransformerLayer:
    """Block `i` with a norm before each branch: `attn_norm` and `ffn_norm`."""
    prefix = f"blk.{i}"
    return TransformerLayer(
        attn_norm=tensors.norm(f"{prefix}.attn_norm", config.d_model),
        attn=tensors.attention(prefix, spec.mixers[0], config.d_model, qk_norm=qk_norm),
        mlp_norm=tensors.norm(f"{prefix}.ffn_norm", config.d_model),
        mlp=tensors.mlp(prefix, spec.mlp, config.d_model),
    )
