"""t5encoder (T5 and Flan-T5 encoders, Sentence-T5, GTR): RMS norms, no biases, scores biased by distance.

Distances fall into buckets, each with a bias per head that all layers share (Raffel et al. 2020, section 2.1,
https://arxiv.org/abs/1910.10683): exact ones for near keys, ever wider ones up to 128 tokens, half for keys before
the query and half for those after it.
"""

from __future__ import annotations

import math

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from oxjax.config import LayerSpec, MLPSpec, ModelConfig
from oxjax.models.base import Frequencies, dense_config
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.encoder import EncoderLayer
from oxjax.models.loader import ParamLoader

FINAL_NORM = "enc.output_norm"

_FURTHEST = 128  # distances from here on share a bucket


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; the feed-forward network is gated (GELU) or plain (ReLU), as its tensors tell."""
    hp.ignore("attention.causal")
    n_buckets = hp.get("attention.relative_buckets_count", int)
    if n_buckets % 4 or not 4 <= n_buckets < 4 * _FURTHEST:
        message = f"found {n_buckets}, expected a multiple of 4 below {4 * _FURTHEST}"
        raise hp.error("attention.relative_buckets_count", message)
    gated = tensors.has("enc.blk.0.ffn_gate.weight")
    mlp = MLPSpec(hp.uniform("feed_forward_length"), "gelu" if gated else "relu", gated=gated)
    tensors.skip("output.weight")  # for predicting tokens
    return dense_config(hp, tensors, pairing=None, attention={"scale": 1.0}, mlp=mlp, causal=False)


def layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> EncoderLayer:
    """Block `i`; one without biases of its own has the first one's."""
    prefix, d = f"enc.blk.{i}", config.d_model
    name = f"{prefix}.attn_rel_b.weight"
    name = name if tensors.has(name) else "enc.blk.0.attn_rel_b.weight"
    return EncoderLayer(
        attn=tensors.attention(prefix, spec.mixers[0], d, out="attn_o"),
        mlp=tensors.mlp(prefix, spec.mlp, d),
        attn_norm=tensors.norm(f"{prefix}.attn_norm", d),
        mlp_norm=tensors.norm(f"{prefix}.ffn_norm", d),
        bias=_bias_by_distance(tensors, name, spec.mixers[0].n_heads),
    )


def _bias_by_distance(tensors: ParamLoader, name: str, n_heads: int) -> Float[Array, "distances n_heads"]:
    n_buckets = tensors.file.get(
        f"{tensors.file.get('general.architecture', str)}.attention.relative_buckets_count", int
    )
    table = tensors.vector(name, n_buckets, n_heads)
    return jax.device_put(table[buckets(np.arange(-_FURTHEST, _FURTHEST + 1), n_buckets)])


def buckets(after: Int[np.ndarray, " n"], n_buckets: int) -> Int[np.ndarray, " n"]:
    """Bucket, of `n_buckets`, of each distance: key position minus query position."""
    half, exact, distance = n_buckets // 2, n_buckets // 4, np.abs(after)
    # Rounded as llama.cpp rounds, since distances lie on the edges of buckets: the logarithm and the sum to float32.
    logarithm = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) * np.float32(half - exact)
    wide = (exact + logarithm.astype(np.float64) / math.log(_FURTHEST / exact)).astype(np.float32)
    wide = np.minimum(np.floor(wide).astype(np.int64), half - 1)
    return np.where(after > 0, half, 0) + np.where(distance < exact, distance, wide)
