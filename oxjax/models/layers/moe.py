"""Mixtures of experts: a router picks a few feed-forward networks for every row (Shazeer et al. 2017,
https://arxiv.org/abs/1701.06538)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float

from oxjax.config import MLPSpec, MoESpec
from oxjax.kernels.dot import dot, row_sum
from oxjax.models.layers.linear import Linear, linear
from oxjax.models.layers.mlp import ACTIVATIONS, MLP, mlp

_SMALLEST_SUM = 6.103515625e-5  # the weights of the chosen experts are divided by no less


@struct.dataclass
class MoE:
    """A router `[d_model, n_experts]`, stacked gated experts, and the one that every row uses with its own gate."""

    router: Linear
    gate: Float[Array, "n_experts d_model d_ff"]
    up: Float[Array, "n_experts d_model d_ff"]
    down: Float[Array, "n_experts d_ff d_model"]
    shared: MLP | None = None
    shared_gate: Linear | None = None


def feed_forward(
    p: MLP | MoE, x: Float[Array, "rows d"], spec: MLPSpec | MoESpec, *, exact: bool
) -> Float[Array, "rows d"]:
    """Either kind of feed-forward layer."""
    return moe(p, x, spec, exact=exact) if isinstance(spec, MoESpec) else mlp(p, x, spec, exact=exact)


def moe(p: MoE, x: Float[Array, "rows d"], spec: MoESpec, *, exact: bool) -> Float[Array, "rows d"]:
    """The sum of the chosen experts' outputs times their weights, plus the shared expert's.

    Experts run one after another over all rows, in one order, so a row's bits do not depend on which experts
    other rows chose; an expert that no row chose is passed over.
    """
    weights = expert_weights(p.router, x, spec, exact=exact)

    def one_expert(total: Array, expert: tuple[Array, ...]) -> tuple[Array, None]:
        weight, gate, up, down = expert

        def run(total: Array) -> Array:
            inner, raised = (y.astype(x.dtype) for y in dot(x, gate, up, exact=exact))
            y = dot(ACTIVATIONS[spec.activation](inner) * raised, down, exact=exact)[0]
            return total + jnp.where(weight > 0.0, weight * y, 0.0)

        return lax.cond(jnp.any(weight > 0.0), run, lambda total: total, total), None

    experts = (weights.T[..., None], p.gate, p.up, p.down)
    total = lax.scan(one_expert, jnp.zeros(x.shape, jnp.float32), experts)[0]
    if p.shared is not None:
        y = mlp(p.shared, x, spec.shared, exact=exact).astype(jnp.float32)
        if p.shared_gate is not None:
            y = y * jax.nn.sigmoid(linear(p.shared_gate, x=x, exact=exact, dtype=jnp.float32)[0])
        total = total + y
    return total.astype(x.dtype)


def expert_weights(
    router: Linear, x: Float[Array, "rows d"], spec: MoESpec, *, exact: bool
) -> Float[Array, "rows n_experts"]:
    """Softmax over all experts, kept for the `n_used` likeliest of each row and zero for the others."""
    scores = linear(router, x=x, exact=exact, dtype=jnp.float32)[0]
    likelihood = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    likelihood = likelihood / row_sum(likelihood, exact=exact)
    chosen = lax.top_k(likelihood, spec.n_used)[1]
    kept = jnp.any(chosen[..., None] == jnp.arange(spec.n_experts), axis=1)
    weights = jnp.where(kept, likelihood, 0.0)
    if spec.renormalise:
        weights = weights / jnp.maximum(row_sum(weights, exact=exact), _SMALLEST_SUM)
    return weights
