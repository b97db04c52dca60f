"""Specs and parameters that the RWKV architectures share, from metadata and tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from oxjax.config import LayerSpec, MLPSpec, ModelConfig
from oxjax.models.base import Frequencies, model_config
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.linear import Linear
from oxjax.models.layers.rwkv import ChannelMix, RwkvLayer
from oxjax.models.layers.rwkv6 import Rwkv6Spec, TimeMix6
from oxjax.models.layers.rwkv7 import Rwkv7Spec, TimeMix7
from oxjax.models.loader import ParamLoader


def rwkv6_spec(hp: Hyperparameters, shifts: int) -> Rwkv6Spec:
    """Spec of RWKV-6's time mixing; see `_state`."""
    conv, ssm = _state(hp, shifts)
    return Rwkv6Spec(
        conv=conv,
        ssm=ssm,
        n_kv_heads=ssm[0],
        mix_rank=hp.uniform("time_mix_extra_dim"),
        decay_rank=hp.uniform("time_decay_extra_dim"),
    )


def rwkv7_spec(hp: Hyperparameters, shifts: int) -> Rwkv7Spec:
    """Spec of RWKV-7's time mixing in the first layer; see `_state`."""
    conv, ssm = _state(hp, shifts)
    return Rwkv7Spec(
        conv=conv,
        ssm=ssm,
        first=True,
        decay_rank=hp.uniform("attention.decay_lora_rank"),
        rate_rank=hp.uniform("attention.iclr_lora_rank"),
        mix_rank=hp.uniform("attention.value_residual_mix_lora_rank"),
        gate_rank=hp.get("attention.gate_lora_rank", int, 0),
    )


def _state(hp: Hyperparameters, shifts: int) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Shapes of a sequence's convolution window and scan state; `shifts` branches of a block read the previous row."""
    if (found := hp.get("token_shift_count", int, 2)) != shifts:
        raise hp.error("token_shift_count", f"found {found}, but {hp.arch} has {shifts}")
    hp.ignore("attention.head_count")  # 0 in its files
    head_dim = hp.uniform("wkv.head_size")
    if hp.d_model % head_dim:
        raise hp.error("wkv.head_size", f"{head_dim} does not divide embedding_length {hp.d_model}")
    return (1, shifts * hp.d_model), (hp.d_model // head_dim, head_dim, head_dim)


def rwkv7_config(
    hp: Hyperparameters, tensors: ParamLoader, shifts: int, feed: MLPSpec, **more: Any
) -> tuple[ModelConfig, Frequencies]:
    """Config of a model of RWKV-7's blocks; `more` are fields of `ModelConfig`."""
    first = rwkv7_spec(hp, shifts)
    later = dataclasses.replace(first, first=False)
    layers = (LayerSpec((later if i else first,), feed) for i in range(hp.n_layers))
    return model_config(hp, tensors, layers, **more)


def time_mix6(tensors: ParamLoader, prefix: str, spec: Rwkv6Spec, d_model: int) -> TimeMix6:
    """Load `time_mix_*` of RWKV-6; the shares are one tensor, or five in early files."""
    n_heads, head_dim, _ = spec.ssm
    mix, d_kv = f"{prefix}.time_mix", spec.n_kv_heads * head_dim
    if tensors.has(f"{mix}_lerp_fused.weight"):
        shares = _numbers(tensors, f"{mix}_lerp_fused", 5, d_model)
    else:
        shares = np.stack([_numbers(tensors, f"{mix}_lerp_{n}", d_model) for n in "wkvrg"])
    has_bonus, has_norm = (tensors.has(f"{mix}_{n}.weight") for n in ("first", "ln"))
    decay = tensors.linear(f"{mix}_decay_w2", spec.decay_rank, d_model)
    ups = tensors.vector(f"{mix}_w2.weight", 5, d_model, spec.mix_rank)
    return TimeMix6(
        share=_put(_numbers(tensors, f"{mix}_lerp_x", d_model)),
        shares=_put(shares),
        low=tensors.linear(f"{mix}_w1", d_model, 5 * spec.mix_rank),
        up=tuple(Linear(_put(up.T.astype(tensors.dtype))) for up in ups),
        decay_low=tensors.linear(f"{mix}_decay_w1", d_model, spec.decay_rank),
        decay=decay.replace(bias=_put(_numbers(tensors, f"{mix}_decay", d_model))),
        key=tensors.linear(f"{mix}_key", d_model, d_kv),
        value=tensors.linear(f"{mix}_value", d_model, d_kv),
        receptance=tensors.linear(f"{mix}_receptance", d_model, d_model),
        gate=tensors.linear(f"{mix}_gate", d_model, d_model),
        out=tensors.linear(f"{mix}_output", d_model, d_model),
        bonus=_put(_numbers(tensors, f"{mix}_first", n_heads, head_dim)) if has_bonus else None,
        head_norm=tensors.norm(f"{mix}_ln", d_model) if has_norm else None,
    )


def time_mix7(tensors: ParamLoader, prefix: str, spec: Rwkv7Spec, d_model: int) -> TimeMix7:
    """Load `time_mix_*` of RWKV-7; the value-mix tensors of the first layer are unused."""
    mix = f"{prefix}.time_mix"

    def pair(name: str, rank: int, *, bias: bool = True) -> tuple[Linear, Linear]:
        low = tensors.linear(f"{mix}_{name}1", d_model, rank)
        up = tensors.linear(f"{mix}_{name}2", rank, d_model)
        return low, up.replace(bias=_put(_numbers(tensors, f"{mix}_{name}0", d_model))) if bias else up

    if spec.first:
        for n in range(3):
            tensors.skip(f"{mix}_v{n}.")
    return TimeMix7(
        shares=_put(_numbers(tensors, f"{mix}_lerp_fused", 6 if spec.gate_rank else 5, d_model)),
        receptance=tensors.linear(f"{mix}_receptance", d_model, d_model),
        key=tensors.linear(f"{mix}_key", d_model, d_model),
        value=tensors.linear(f"{mix}_value", d_model, d_model),
        out=tensors.linear(f"{mix}_output", d_model, d_model),
        decay=pair("w", spec.decay_rank),
        rate=pair("a", spec.rate_rank),
        key_scale=_put(_numbers(tensors, f"{mix}_k_k", d_model)),
        key_rate=_put(_numbers(tensors, f"{mix}_k_a", d_model)),
        bonus=_put(_numbers(tensors, f"{mix}_r_k", d_model)),
        mix=None if spec.first else pair("v", spec.mix_rank),
        gate=pair("g", spec.gate_rank, bias=False) if spec.gate_rank else None,
        head_norm=tensors.norm(f"{mix}_ln", d_model) if tensors.has(f"{mix}_ln.weight") else None,
    )


def channel_mix(tensors: ParamLoader, prefix: str, d_ff: int, d_model: int) -> ChannelMix:
    """Load `channel_mix_*`; RWKV-6's has a receptance."""
    mix = f"{prefix}.channel_mix"
    found = ChannelMix(
        key_share=_put(_numbers(tensors, f"{mix}_lerp_k", d_model)),
        key=tensors.linear(f"{mix}_key", d_model, d_ff),
        value=tensors.linear(f"{mix}_value", d_ff, d_model),
    )
    if not tensors.has(f"{mix}_receptance.weight"):
        return found
    return found.replace(
        receptance_share=_put(_numbers(tensors, f"{mix}_lerp_r", d_model)),
        receptance=tensors.linear(f"{mix}_receptance", d_model, d_model),
    )


def rwkv_layer(tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> RwkvLayer:
    """Load block `i`, with channel mixing if the window holds its previous row too, else with an MLP."""
    prefix, (mixer,), d_model = f"blk.{i}", spec.mixers, config.d_model
    mixes = mixer.conv[1] > d_model
    load = time_mix6 if isinstance(mixer, Rwkv6Spec) else time_mix7
    return RwkvLayer(
        norm=tensors.norm(f"{prefix}.attn_norm", d_model),
        time_mix=load(tensors, prefix, mixer, d_model),
        mlp_norm=tensors.norm(f"{prefix}.{'attn_norm_2' if mixes else 'ffn_norm'}", d_model),
        mlp=channel_mix(tensors, prefix, spec.mlp.d_ff, d_model) if mixes else tensors.mlp(prefix, spec.mlp, d_model),
    )


def _numbers(tensors: ParamLoader, name: str, *shape: int) -> np.ndarray:
    """Load `<name>.weight` as float32; its shape in the file may have extra axes of size one."""
    info = tensors.file.tensors.get(f"{name}.weight")
    squeezed = info is not None and tuple(n for n in info.shape if n != 1) == shape
    return tensors.vector(f"{name}.weight", *(info.shape if squeezed else shape)).reshape(shape)


def _put(numbers: np.ndarray) -> Array:
    return jax.device_put(np.ascontiguousarray(numbers))
