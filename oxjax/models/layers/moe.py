"""Mixtures of experts: a router picks a few feed-forward networks for every row (Shazeer et al. 2017,
https://arxiv.org/abs/1701.06538).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from oxjax.config import MLPSpec, MoESpec
from oxjax.kernels.dot import dot_heads, row_sum, softmax
from oxjax.kernels.grouped import grouped_matmul
from oxjax.kernels.numerics import Numerics
from oxjax.kernels.quantized import QuantizedTensor
from oxjax.models.layers.linear import Linear, linear
from oxjax.models.layers.mlp import ACTIVATIONS, MLP, gated, mlp

_SMALLEST_SUM = 6.103515625e-5  # the weights of the chosen experts are divided by no less


@struct.dataclass
class Experts:
    """A linear map of every expert, of any float dtype or quantised, with optional float32 biases."""

    weight: Float[Array, "n_experts d_in d_out"] | QuantizedTensor
    bias: Float[Array, "n_experts d_out"] | None = None


@struct.dataclass
class MoE:
    """A router `[d_model, n_experts]`, the experts' maps, and the expert that every row uses, perhaps with a gate.

    The selection bias, float32 `[n_experts]`, counts where experts are chosen, not where they are weighed. The
    latent maps, `[d_model, d_latent]` and back, are there where `MoESpec.d_latent` is.
    """

    router: Linear
    up: Experts
    down: Experts
    gate: Experts | None = None
    score_correction_bias: Float[Array, " n_experts"] | None = None
    shared: MLP | None = None
    shared_gate: Linear | None = None
    latent_down: Linear | None = None
    latent_up: Linear | None = None


def feed_forward(
    p: MLP | MoE,
    x: Float[Array, "rows d"],
    spec: MLPSpec | MoESpec,
    numerics: Numerics,
    *,
    is_real: Bool[Array, " rows"] | None = None,
) -> Float[Array, "rows d"]:
    """Either kind of feed-forward layer; rows that are not real read no experts."""
    if isinstance(spec, MoESpec):
        return moe(p, x, spec, numerics, is_real=is_real)
    return mlp(p, x, spec, numerics)


def moe(
    p: MoE,
    x: Float[Array, "rows d"],
    spec: MoESpec,
    numerics: Numerics,
    *,
    is_real: Bool[Array, " rows"] | None = None,
) -> Float[Array, "rows d"]:
    """The sum of the chosen experts' outputs times their weights, plus the shared expert's."""
    chosen, weights = route(p, x, spec, numerics)
    if is_real is not None:
        chosen = jnp.where(is_real[:, None], chosen, spec.n_experts)
    read = (x if p.latent_down is None else linear(p.latent_down, x, numerics))[:, None]
    if spec.router_weight_on_input:
        read, weights = (read * weights[..., None]).astype(x.dtype), jnp.ones_like(weights)
    maps = (p.up,) if p.gate is None else (p.gate, p.up)
    inner = [y.astype(x.dtype) for y in _affine(read, chosen, *maps, numerics=numerics)]
    inner = ACTIVATIONS[spec.activation](*inner) if p.gate is None else gated(spec.activation, *inner)
    given = _affine(inner, chosen, p.down, numerics=numerics)[0]
    total = dot_heads(weights[None], given, numerics=numerics)[0]  # each row's weights times what its experts gave
    if p.latent_up is not None:
        total = linear(p.latent_up, total.astype(x.dtype), numerics, dtype=jnp.float32)
    if p.shared is not None:
        y = mlp(p.shared, x, spec.shared, numerics).astype(jnp.float32)
        if p.shared_gate is not None:
            y = y * jax.nn.sigmoid(linear(p.shared_gate, x, numerics, dtype=jnp.float32))
        total = total + y
    return (total * spec.output_scale).astype(x.dtype)


def route(
    p: MoE, x: Float[Array, "rows d"], spec: MoESpec, numerics: Numerics
) -> tuple[Int[Array, "rows n_experts_per_token"], Float[Array, "rows n_experts_per_token"]]:
    """The experts of each row and their weights, best first.

    Without bias and groups the logits themselves choose, which is the order of their softmax and of their sigmoids.
    """
    logits = linear(p.router, x, numerics, dtype=jnp.float32)
    scores = _scores(logits, spec, numerics)
    ranked = logits
    if p.score_correction_bias is not None or spec.n_groups > 1:
        ranked = scores if p.score_correction_bias is None else scores + p.score_correction_bias
    if spec.n_groups > 1:
        ranked = _best_groups(ranked, spec)
    chosen = lax.top_k(ranked, spec.n_experts_per_token)[1]
    weights = jnp.take_along_axis(scores, chosen, axis=1)
    if spec.gating == "softmax_topk":
        weights = softmax(weights, numerics=numerics)
    if spec.norm_topk_prob:
        weights = weights / jnp.maximum(row_sum(weights, numerics=numerics), _SMALLEST_SUM)
    return chosen, weights * spec.scale


def _scores(logits: Array, spec: MoESpec, numerics: Numerics) -> Array:
    if spec.gating == "softmax":
        return softmax(logits, numerics=numerics)
    return jax.nn.sigmoid(logits) if spec.gating == "sigmoid" else logits


def _best_groups(ranked: Array, spec: MoESpec) -> Array:
    """Scores with those of all but the best groups masked (DeepSeek-V3, https://arxiv.org/abs/2412.19437)."""
    groups = ranked.reshape(ranked.shape[0], spec.n_groups, -1)
    best_two = lax.top_k(groups, min(2, groups.shape[2]))[0]
    best = lax.top_k(best_two[..., 0] + best_two[..., -1], spec.n_groups_used)[1]
    kept = jnp.any(best[..., None] == jnp.arange(spec.n_groups), axis=1)
    return jnp.where(kept[..., None], groups, -jnp.inf).reshape(ranked.shape)


def _affine(x: Array, chosen: Array, *maps: Experts, numerics: Numerics) -> list[Array]:
    """Rows through several maps of the experts that they chose, in float32."""
    kinds = {isinstance(p.weight, QuantizedTensor) for p in maps}
    calls = [maps] if len(kinds) == 1 else [(p,) for p in maps]
    products = (y for call in calls for y in grouped_matmul(x, chosen, *(p.weight for p in call), numerics=numerics))
    return [y if p.bias is None else y + p.bias[chosen] for p, y in zip(maps, products, strict=True)]
