"""The tensors of a layer's mixers, as the architectures name them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oxjax.config import AttentionSpec, LatentSpec
from oxjax.models.latent import load_latent
from oxjax.models.layers.conv import Conv
from oxjax.models.layers.delta_net import DeltaNet, DeltaNetSpec
from oxjax.models.layers.kimi_delta import KimiDelta, KimiDeltaSpec
from oxjax.models.layers.linear import Linear
from oxjax.models.layers.mamba import Mamba, MambaSpec
from oxjax.models.layers.mamba2 import Mamba2, Mamba2Spec
from oxjax.models.layers.norms import Norm
from oxjax.models.layers.plamo_mamba import PlamoMamba, PlamoMambaSpec
from oxjax.models.layers.short_conv import ShortConv, ShortConvSpec
from oxjax.models.loader import ParamLoader

# Reads the parameters of one mixer, given the tensors, the prefix of its block (`blk.3`), its spec and d_model.
MixerLoader = Callable[[ParamLoader, str, Any, int], Any]


def _conv(tensors: ParamLoader, name: str, conv: tuple[int, int]) -> Conv:
    kernel, channels = conv[0] + 1, conv[1]
    weight = tensors.vector(f"{name}.weight", channels, kernel)
    bias = tensors.vector(f"{name}.bias", channels) if tensors.has(f"{name}.bias") else None
    return Conv(weight=_put(weight.T), bias=None if bias is None else _put(bias))


def _put(vector: np.ndarray) -> jax.Array:
    return jax.device_put(np.ascontiguousarray(vector))


def _mamba(tensors: ParamLoader, prefix: str, spec: MambaSpec, d_model: int) -> Mamba:
    d_state, d_inner = spec.ssm
    x, z = tensors.fused(f"{prefix}.ssm_in", d_model, (d_inner, d_inner))
    dt_low, b, c = tensors.fused(f"{prefix}.ssm_x", d_inner, (spec.dt_rank, d_state, d_state))

    def low_norm(name: str, d: int) -> Norm | None:
        if spec.low_norm == "learned":
            return tensors.norm(f"{prefix}.ssm_{name}_norm", d)
        return Norm() if spec.low_norm == "unit" else None

    return Mamba(
        x=x,
        z=z,
        conv=_conv(tensors, f"{prefix}.ssm_conv1d", spec.conv),
        dt_low=dt_low,
        b=b,
        c=c,
        dt=tensors.linear(f"{prefix}.ssm_dt", spec.dt_rank, d_inner),
        a=_put(tensors.vector(f"{prefix}.ssm_a", d_inner, d_state).T),
        d=_put(tensors.vector(f"{prefix}.ssm_d", d_inner)),
        out=tensors.linear(f"{prefix}.ssm_out", d_inner, d_model),
        dt_norm=low_norm("dt", spec.dt_rank),
        b_norm=low_norm("b", d_state),
        c_norm=low_norm("c", d_state),
    )


def _mamba2(tensors: ParamLoader, prefix: str, spec: Mamba2Spec, d_model: int) -> Mamba2:
    n_heads, _, head_dim = spec.ssm
    d_inner = n_heads * head_dim
    z, xbc, dt = tensors.fused(f"{prefix}.ssm_in", d_model, (d_inner, spec.conv[1], n_heads))
    has_norm = tensors.has(f"{prefix}.ssm_norm.weight")
    return Mamba2(
        z=z,
        xbc=xbc,
        dt=dt.replace(bias=_put(tensors.vector(f"{prefix}.ssm_dt.bias", n_heads))),
        conv=_conv(tensors, f"{prefix}.ssm_conv1d", spec.conv),
        a=_put(tensors.vector(f"{prefix}.ssm_a", n_heads, 1)[:, 0]),
        d=_put(tensors.vector(f"{prefix}.ssm_d", n_heads, 1)[:, 0]),
        out=tensors.linear(f"{prefix}.ssm_out", d_inner, d_model),
        norm=tensors.norm(f"{prefix}.ssm_norm", spec.n_groups, d_inner // spec.n_groups) if has_norm else None,
    )


def _plamo_mamba(tensors: ParamLoader, prefix: str, spec: PlamoMambaSpec, d_model: int) -> PlamoMamba:
    n_heads, d_state, head_dim = spec.ssm
    d_inner = n_heads * head_dim
    z, x = tensors.interleaved(f"{prefix}.ssm_in", d_model, n_heads, (head_dim, head_dim))
    b, c, dt_low = tensors.fused(f"{prefix}.ssm_x", d_inner, (d_state, d_state, spec.dt_rank))
    return PlamoMamba(
        z=z,
        x=x,
        conv=_conv(tensors, f"{prefix}.ssm_conv1d", spec.conv),
        b=b,
        c=c,
        dt_low=dt_low,
        b_norm=tensors.norm(f"{prefix}.ssm_b_norm", d_state),
        c_norm=tensors.norm(f"{prefix}.ssm_c_norm", d_state),
        dt_norm=tensors.norm(f"{prefix}.ssm_dt_norm", spec.dt_rank),
        dt=tensors.linear(f"{prefix}.ssm_dt", spec.dt_rank, n_heads),
        a=_put(tensors.vector(f"{prefix}.ssm_a", n_heads)),
        d=_put(tensors.vector(f"{prefix}.ssm_d", n_heads)),
        out=tensors.linear(f"{prefix}.ssm_out", d_inner, d_model),
    )


def _delta_net(tensors: ParamLoader, prefix: str, spec: DeltaNetSpec, d_model: int) -> DeltaNet:
    n_heads, key_dim, value_dim = spec.ssm
    n_key, repeats, d_inner = spec.n_key_heads, n_heads // spec.n_key_heads, n_heads * value_dim
    if tensors.has(f"{prefix}.ssm_in.weight"):  # early qwen3next files: q, k, v and z of one key head after another
        widths = (key_dim, key_dim, repeats * value_dim, repeats * value_dim)
        *qkv, z = tensors.interleaved(f"{prefix}.ssm_in", d_model, n_key, widths)
        qkv = Linear(jnp.concatenate([p.weight for p in qkv], axis=1))
    else:
        qkv = tensors.linear(f"{prefix}.attn_qkv", d_model, spec.conv[1])
        z = tensors.linear(f"{prefix}.attn_gate", d_model, d_inner)
    if tensors.has(f"{prefix}.ssm_ba.weight"):
        beta, alpha = tensors.interleaved(f"{prefix}.ssm_ba", d_model, n_key, (repeats, repeats))
    else:
        beta, alpha = (tensors.linear(f"{prefix}.ssm_{name}", d_model, n_heads) for name in ("beta", "alpha"))
    return DeltaNet(
        qkv=qkv,
        z=z,
        beta=beta,
        alpha=alpha.replace(bias=_put(tensors.vector(f"{prefix}.ssm_dt.bias", n_heads))),
        conv=_conv(tensors, f"{prefix}.ssm_conv1d", spec.conv),
        a=_put(tensors.vector(f"{prefix}.ssm_a", n_heads)),
        norm=tensors.norm(f"{prefix}.ssm_norm", value_dim),
        out=tensors.linear(f"{prefix}.ssm_out", d_inner, d_model),
    )


def _kimi_delta(tensors: ParamLoader, prefix: str, spec: KimiDeltaSpec, d_model: int) -> KimiDelta:
    n_heads, head_dim, _ = spec.ssm
    d_inner, kernel = n_heads * head_dim, spec.conv[0] + 1
    if tensors.has(f"{prefix}.attn_qkv.weight"):
        q, k, v = tensors.fused(f"{prefix}.attn_qkv", d_model, (d_inner,) * 3)
    else:
        q, k, v = (tensors.linear(f"{prefix}.attn_{n}", d_model, d_inner) for n in "qkv")

    def pair(name: str) -> tuple[Linear, Linear]:
        low, back = tensors.linear(f"{prefix}.{name}_a", d_model, head_dim), f"{prefix}.{name}_b"
        return low, tensors.linear(back, head_dim, d_inner)

    low, decay = pair("ssm_f")
    taps = [_without_ones(tensors, f"{prefix}.ssm_conv1d_{n}.weight", d_inner, kernel) for n in "qkv"]
    return KimiDelta(
        q=q,
        k=k,
        v=v,
        beta=tensors.linear(f"{prefix}.ssm_beta", d_model, n_heads),
        decay=(low, decay.replace(bias=_put(tensors.vector(f"{prefix}.ssm_dt.bias", d_inner)))),
        gate=pair("ssm_g"),
        conv=Conv(weight=_put(np.concatenate(taps).T)),
        a=_put(_without_ones(tensors, f"{prefix}.ssm_a", n_heads)),
        norm=tensors.norm(f"{prefix}.ssm_norm", head_dim),
        out=tensors.linear(f"{prefix}.attn_output", d_inner, d_model),
    )


def _without_ones(tensors: ParamLoader, name: str, *shape: int) -> np.ndarray:
    """A table of this shape, whose stored one may have axes of length one besides."""
    stored = tensors.file.tensors[name].shape if tensors.has(name) else shape
    same = [n for n in stored if n > 1] == [n for n in shape if n > 1]
    return tensors.vector(name, *(stored if same else shape)).reshape(shape)


def _short_conv(tensors: ParamLoader, prefix: str, spec: ShortConvSpec, d_model: int) -> ShortConv:
    gate_in, gate_out, x = tensors.fused(f"{prefix}.shortconv.in_proj", d_model, (d_model,) * 3)
    return ShortConv(
        gate_in=gate_in,
        gate_out=gate_out,
        x=x,
        conv=_conv(tensors, f"{prefix}.shortconv.conv", spec.conv),
        out=tensors.linear(f"{prefix}.shortconv.out_proj", d_model, d_model),
    )


MIXER_LOADERS: dict[type, MixerLoader] = {
    AttentionSpec: ParamLoader.attention,
    DeltaNetSpec: _delta_net,
    KimiDeltaSpec: _kimi_delta,
    LatentSpec: load_latent,
    MambaSpec: _mamba,
    Mamba2Spec: _mamba2,
    PlamoMambaSpec: _plamo_mamba,
    ShortConvSpec: _short_conv,
}
