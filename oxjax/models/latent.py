"""Latent attention (MLA): spec from metadata, parameters from tensors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from oxjax.config import LatentSpec, ModelConfig
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.latent import LatentAttention
from oxjax.models.loader import ParamLoader


def with_latent(hp: Hyperparameters, config: ModelConfig, **more: Any) -> ModelConfig:
    """Config with latent attention on all layers; see `latent_spec`."""
    spec = latent_spec(hp, **more)
    layers = (dataclasses.replace(layer, mixers=(spec,)) for layer in config.layers)
    return dataclasses.replace(config, layers=tuple(layers))


def latent_spec(hp: Hyperparameters, *, scale: float = 1.0, **more: Any) -> LatentSpec:
    """Spec of one layer's latent attention; scores are multiplied by scale / sqrt(head dimension).

    Files with separate matrices for keys and values state the head dimensions in `key_length_mla` and
    `value_length_mla`, older ones in `key_length` and `value_length`.
    """
    key_dim = hp.get("attention.key_length_mla", int, 0) or hp.key_dim
    value_dim = hp.get("attention.value_length_mla", int, 0) or hp.value_dim
    hp.ignore("attention.value_length")  # length of the latents, if the file has `value_length_mla`
    if not 0 < hp.rope_dim < key_dim:
        raise hp.error("rope.dimension_count", f"found {hp.rope_dim}, expected less than the head dimension {key_dim}")
    return LatentSpec(
        n_heads=hp.n_heads,
        q_rank=hp.get("attention.q_lora_rank", int, 0) or None,
        kv_rank=hp.uniform("attention.kv_lora_rank"),
        nope_dim=key_dim - hp.rope_dim,
        rope_dim=hp.rope_dim,
        value_dim=value_dim,
        scale=scale / math.sqrt(key_dim),
        **more,
    )


def load_latent(tensors: ParamLoader, prefix: str, spec: LatentSpec, d_model: int) -> LatentAttention:
    """Load `<prefix>.attn_*`; keys and values have a matrix each (`k_b`, `v_b`) or, in old files, one (`kv_b`)."""
    q_width = spec.n_heads * (spec.nope_dim + spec.rope_dim)
    if spec.q_rank is None:
        q, q_low, q_norm = tensors.linear(f"{prefix}.attn_q", d_model, q_width), None, None
    else:
        q_low = tensors.linear(f"{prefix}.attn_q_a", d_model, spec.q_rank)
        q_norm = tensors.norm(f"{prefix}.attn_q_a_norm", spec.q_rank)
        q = tensors.linear(f"{prefix}.attn_q_b", spec.q_rank, q_width)
    heads, nope, rank, value = spec.n_heads, spec.nope_dim, spec.kv_rank, spec.value_dim
    if tensors.has(f"{prefix}.attn_kv_b.weight"):
        both = tensors.vector(f"{prefix}.attn_kv_b.weight", heads * (nope + value), rank)
        k_up, v_up = np.split(both.reshape(heads, nope + value, rank), [nope], axis=1)
    else:
        k_up = tensors.vector(f"{prefix}.attn_k_b.weight", heads, rank, nope).swapaxes(1, 2)
        v_up = tensors.vector(f"{prefix}.attn_v_b.weight", heads, value, rank)
    k_up, v_up = (jax.device_put(np.ascontiguousarray(m, tensors.dtype)) for m in (k_up, v_up.swapaxes(1, 2)))
    return LatentAttention(
        q=q,
        q_low=q_low,
        q_norm=q_norm,
        kv_low=tensors.linear(f"{prefix}.attn_kv_a_mqa", d_model, rank + spec.rope_dim),
        kv_norm=tensors.norm(f"{prefix}.attn_kv_a_norm", rank),
        k_up=k_up,
        v_up=v_up,
        out=tensors.linear(f"{prefix}.attn_output", heads * value, d_model),
    )
