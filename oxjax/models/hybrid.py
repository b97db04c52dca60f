"""What architectures with recurrent layers share: their metadata, their tensors, their blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oxjax.config import AttentionSpec, LayerSpec, MixerSpec, ModelConfig
from oxjax.models.base import attention_spec
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.attention import Attention
from oxjax.models.layers.conv import Conv
from oxjax.models.layers.delta_net import DeltaNet, DeltaNetSpec
from oxjax.models.layers.hybrid import HybridLayer
from oxjax.models.layers.linear import Linear
from oxjax.models.layers.mamba import Mamba, MambaSpec
from oxjax.models.layers.mamba2 import Mamba2, Mamba2Spec
from oxjax.models.layers.norms import Norm
from oxjax.models.layers.plamo_mamba import PlamoMamba, PlamoMambaSpec
from oxjax.models.layers.short_conv import ShortConv, ShortConvSpec
from oxjax.models.loader import ParamLoader


def attention_or(hp: Hyperparameters, recurrent: MixerSpec, **attention: Any) -> tuple[MixerSpec, ...]:
    """The mixer of each layer: recurrent where `attention.head_count_kv` is 0, else attention with these fields."""
    mixers: list[MixerSpec] = []
    for n_kv_heads in hp.per_layer("attention.head_count_kv", hp.n_heads):
        if n_kv_heads < 0 or (n_kv_heads and hp.n_heads % n_kv_heads):
            raise hp.error("attention.head_count_kv", f"{n_kv_heads} does not divide head_count {hp.n_heads}")
        mixers.append(attention_spec(hp, n_kv_heads=n_kv_heads, **attention) if n_kv_heads else recurrent)
    return tuple(mixers)


def _divides(hp: Hyperparameters, key: str, divisor: int, number: int) -> int:
    if number % divisor:
        raise hp.error(key, f"{divisor} does not divide {number}")
    return divisor


def mamba_spec(hp: Hyperparameters, *, low_norm: str | None) -> MambaSpec:
    """Mamba as `ssm.*` describes it; see `MambaSpec.low_norm`."""
    d_inner, kernel = hp.uniform("ssm.inner_size"), hp.uniform("ssm.conv_kernel")
    return MambaSpec(
        conv=(kernel - 1, d_inner),
        ssm=(hp.uniform("ssm.state_size"), d_inner),
        dt_rank=hp.uniform("ssm.time_step_rank"),
        low_norm=low_norm,
    )


def mamba2_spec(hp: Hyperparameters) -> Mamba2Spec:
    """Mamba-2 as `ssm.*` describes it; `ssm.time_step_rank` is its number of heads."""
    d_inner, d_state = hp.uniform("ssm.inner_size"), hp.uniform("ssm.state_size")
    n_heads = _divides(hp, "ssm.time_step_rank", hp.uniform("ssm.time_step_rank"), d_inner)
    n_groups = _divides(hp, "ssm.group_count", hp.uniform("ssm.group_count"), n_heads)
    return Mamba2Spec(
        conv=(hp.uniform("ssm.conv_kernel") - 1, d_inner + 2 * n_groups * d_state),
        ssm=(n_heads, d_state, d_inner // n_heads),
        n_groups=n_groups,
    )


def plamo_mamba_spec(hp: Hyperparameters) -> PlamoMambaSpec:
    """PLaMo 2's Mamba as `ssm.*` describes it; the width of the narrow projection has no key."""
    d_inner, d_state = hp.uniform("ssm.inner_size"), hp.uniform("ssm.state_size")
    n_heads = _divides(hp, "ssm.time_step_rank", hp.uniform("ssm.time_step_rank"), d_inner)
    hp.key("ssm.group_count")  # 0 in its files; all heads share b and c
    return PlamoMambaSpec(
        conv=(hp.uniform("ssm.conv_kernel") - 1, d_inner),
        ssm=(n_heads, d_state, d_inner // n_heads),
        dt_rank=max(64, hp.d_model // 16),
    )


def delta_net_spec(hp: Hyperparameters, *, tiled: bool) -> DeltaNetSpec:
    """Gated DeltaNet as `ssm.*` describes it: groups are its key heads, the time step's rank its value heads."""
    dim, n_heads = hp.uniform("ssm.state_size"), hp.uniform("ssm.time_step_rank")
    n_key_heads = _divides(hp, "ssm.group_count", hp.uniform("ssm.group_count"), n_heads)
    if (d_inner := hp.uniform("ssm.inner_size")) != n_heads * dim:
        raise hp.error("ssm.inner_size", f"found {d_inner}, expected {n_heads} heads of {dim}")
    return DeltaNetSpec(
        conv=(hp.uniform("ssm.conv_kernel") - 1, (2 * n_key_heads + n_heads) * dim),
        ssm=(n_heads, dim, dim),
        n_key_heads=n_key_heads,
        tiled=tiled,
    )


def hybrid_layer(
    tensors: ParamLoader,
    i: int,
    spec: LayerSpec,
    config: ModelConfig,
    *,
    mlp_norm: str = "ffn_norm.weight",
    attention: Callable[..., Attention] = ParamLoader.attention,
) -> HybridLayer:
    """Block `i`, from the tensors that most architectures name alike.

    Args:
        tensors: the file's tensors.
        i: which block.
        spec: its static facts.
        config: the model's.
        mlp_norm: the tensor of the norm before the feed-forward layer.
        attention: loads an attention mixer, given tensors, prefix, spec and d_model.
    """
    prefix, loaders = f"blk.{i}", {**_LOADERS, AttentionSpec: attention}
    layer = HybridLayer(
        norm=tensors.norm(f"{prefix}.attn_norm", config.d_model) if spec.mixers else None,
        mixers=tuple(loaders[type(s)](tensors, prefix, s, config.d_model) for s in spec.mixers),
    )
    if spec.mlp is None:
        return layer
    return layer.replace(
        mlp_norm=Norm(_put(tensors.vector(f"{prefix}.{mlp_norm}", config.d_model))),
        mlp=tensors.feed_forward(prefix, spec.mlp, config.d_model),
    )


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
    z, x = take_apart(tensors.linear(f"{prefix}.ssm_in", d_model, 2 * d_inner), n_heads, (head_dim, head_dim))
    b, c, dt_low = tensors.fused(f"{prefix}.ssm_x", d_inner, (d_state, d_state, spec.dt_rank))
    return PlamoMamba(
        z=z,
        x=x,
        conv=_conv(tensors, f"{prefix}.ssm_conv1d", spec.conv),
        b=b,
        c=c,
        dt_low=dt_low,
        b_norm=tensors.bare_norm(f"{prefix}.ssm_b_norm", d_state),
        c_norm=tensors.bare_norm(f"{prefix}.ssm_c_norm", d_state),
        dt_norm=tensors.bare_norm(f"{prefix}.ssm_dt_norm", spec.dt_rank),
        dt=tensors.linear(f"{prefix}.ssm_dt", spec.dt_rank, n_heads),
        a=_put(tensors.vector(f"{prefix}.ssm_a", n_heads)),
        d=_put(tensors.vector(f"{prefix}.ssm_d", n_heads)),
        out=tensors.linear(f"{prefix}.ssm_out", d_inner, d_model),
    )


def take_apart(p: Linear, groups: int, widths: tuple[int, ...]) -> tuple[Linear, ...]:
    """Maps whose outputs take turns in one: each of the groups holds so many of each."""
    weight = p.weight.reshape(p.weight.shape[0], groups, sum(widths))
    ends = np.cumsum(widths)
    return tuple(
        Linear(weight[:, :, end - width : end].reshape(weight.shape[0], -1))
        for end, width in zip(ends, widths, strict=True)
    )


def _delta_net(tensors: ParamLoader, prefix: str, spec: DeltaNetSpec, d_model: int) -> DeltaNet:
    n_heads, key_dim, value_dim = spec.ssm
    n_key, repeats, d_inner = spec.n_key_heads, n_heads // spec.n_key_heads, n_heads * value_dim
    if tensors.has(f"{prefix}.ssm_in.weight"):  # early qwen3next files: q, k, v and z of one key head after another
        fused = tensors.linear(f"{prefix}.ssm_in", d_model, spec.conv[1] + d_inner, quantized=False)
        *qkv, z = take_apart(fused, n_key, (key_dim, key_dim, repeats * value_dim, repeats * value_dim))
        qkv = Linear(jnp.concatenate([p.weight for p in qkv], axis=1))
    else:
        qkv = tensors.linear(f"{prefix}.attn_qkv", d_model, spec.conv[1])
        z = tensors.linear(f"{prefix}.attn_gate", d_model, d_inner)
    if tensors.has(f"{prefix}.ssm_ba.weight"):
        fused = tensors.linear(f"{prefix}.ssm_ba", d_model, 2 * n_heads, quantized=False)
        beta, alpha = take_apart(fused, n_key, (repeats, repeats))
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


def _short_conv(tensors: ParamLoader, prefix: str, spec: ShortConvSpec, d_model: int) -> ShortConv:
    gate_in, gate_out, x = tensors.fused(f"{prefix}.shortconv.in_proj", d_model, (d_model,) * 3)
    return ShortConv(
        gate_in=gate_in,
        gate_out=gate_out,
        x=x,
        conv=_conv(tensors, f"{prefix}.shortconv.conv", spec.conv),
        out=tensors.linear(f"{prefix}.shortconv.out_proj", d_model, d_model),
    )


_LOADERS = {
    DeltaNetSpec: _delta_net,
    MambaSpec: _mamba,
    Mamba2Spec: _mamba2,
    PlamoMambaSpec: _plamo_mamba,
    ShortConvSpec: _short_conv,
}


def gated_attention(tensors: ParamLoader, prefix: str, spec: AttentionSpec, d_model: int) -> Attention:
    """Attention whose `attn_q` gives each head's query and then its gate, with norms of queries and keys."""
    fused = tensors.linear(f"{prefix}.attn_q", d_model, 2 * spec.n_heads * spec.key_dim, quantized=False)
    q, gate = take_apart(fused, spec.n_heads, (spec.key_dim, spec.key_dim))
    return Attention(
        q=q,
        gate=gate,
        k=tensors.linear(f"{prefix}.attn_k", d_model, spec.n_kv_heads * spec.key_dim),
        v=tensors.linear(f"{prefix}.attn_v", d_model, spec.n_kv_heads * spec.value_dim),
        out=tensors.linear(f"{prefix}.attn_output", spec.n_heads * spec.value_dim, d_model),
        q_norm=tensors.norm(f"{prefix}.attn_q_norm", spec.key_dim),
        k_norm=tensors.norm(f"{prefix}.attn_k_norm", spec.key_dim),
    )
