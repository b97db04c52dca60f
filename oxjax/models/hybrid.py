"""Specs of recurrent mixers, from metadata."""

from __future__ import annotations

from typing import Any

from oxjax.config import MixerSpec
from oxjax.models.base import attention_spec
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.delta_net import DeltaNetSpec
from oxjax.models.layers.mamba import MambaSpec
from oxjax.models.layers.mamba2 import Mamba2Spec
from oxjax.models.layers.plamo_mamba import PlamoMambaSpec


def attention_or_recurrent(hp: Hyperparameters, recurrent: MixerSpec, **attention: Any) -> tuple[MixerSpec, ...]:
    """Mixer of each layer: recurrent where `attention.head_count_kv` is 0, else attention with these fields."""
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
    """Spec of Mamba, from `ssm.*`; see `MambaSpec.low_norm`."""
    d_inner, kernel = hp.uniform("ssm.inner_size"), hp.uniform("ssm.conv_kernel")
    return MambaSpec(
        conv=(kernel - 1, d_inner),
        ssm=(hp.uniform("ssm.state_size"), d_inner),
        dt_rank=hp.uniform("ssm.time_step_rank"),
        low_norm=low_norm,
    )


def mamba2_spec(hp: Hyperparameters) -> Mamba2Spec:
    """Spec of Mamba-2, from `ssm.*`; `ssm.time_step_rank` is its number of heads."""
    d_inner, d_state = hp.uniform("ssm.inner_size"), hp.uniform("ssm.state_size")
    n_heads = _divides(hp, "ssm.time_step_rank", hp.uniform("ssm.time_step_rank"), d_inner)
    n_groups = _divides(hp, "ssm.group_count", hp.uniform("ssm.group_count"), n_heads)
    return Mamba2Spec(
        conv=(hp.uniform("ssm.conv_kernel") - 1, d_inner + 2 * n_groups * d_state),
        ssm=(n_heads, d_state, d_inner // n_heads),
        n_groups=n_groups,
    )


def plamo_mamba_spec(hp: Hyperparameters) -> PlamoMambaSpec:
    """Spec of PLaMo 2's Mamba, from `ssm.*`; the width of the narrow projection has no key."""
    d_inner, d_state = hp.uniform("ssm.inner_size"), hp.uniform("ssm.state_size")
    n_heads = _divides(hp, "ssm.time_step_rank", hp.uniform("ssm.time_step_rank"), d_inner)
    hp.ignore("ssm.group_count")  # 0 in its files; all heads share b and c
    return PlamoMambaSpec(
        conv=(hp.uniform("ssm.conv_kernel") - 1, d_inner),
        ssm=(n_heads, d_state, d_inner // n_heads),
        dt_rank=max(64, hp.d_model // 16),
    )


def delta_net_spec(hp: Hyperparameters, *, tiled: bool) -> DeltaNetSpec:
    """Spec of Gated DeltaNet, from `ssm.*`: groups are key heads, the rank of the time step is value heads."""
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
