"""Feed-forward networks, plain (Vaswani et al. 2017) and gated (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from oxjax.config import MLPSpec
from oxjax.kernels.numerics import Numerics
from oxjax.models.layers.linear import Linear, linear, linears

ACTIVATIONS = {
    "silu": jax.nn.silu,
    # The tanh approximation in every GGUF architecture that says GELU.
    "gelu": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, https://arxiv.org/abs/2109.08668
}


@struct.dataclass
class MLP:
    """Up `[d_model, d_ff]`, down `[d_ff, d_model]` and, in a gated one, gate `[d_model, d_ff]`."""

    up: Linear
    down: Linear
    gate: Linear | None = None


def gated(activation: str, gate: Float[Array, "*rows d_ff"], up: Float[Array, "*rows d_ff"]) -> Array:
    """act(gate) · up; "swiglu_oai" bounds both and adds one to the latter (gpt-oss, https://arxiv.org/abs/2508.10925)."""
    if activation == "swiglu_oai":
        gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
        return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1.0)
    return ACTIVATIONS[activation](gate) * up


def mlp(p: MLP, x: Float[Array, "rows d"], spec: MLPSpec, numerics: Numerics) -> Float[Array, "rows d"]:
    """down(act(gate x) · up x), or down(act(up x)) without a gate."""
    if p.gate is None:
        inner = ACTIVATIONS[spec.activation](linear(p.up, x, numerics))
    else:
        gate, up = linears((p.gate, p.up), x, numerics)
        inner = gated(spec.activation, gate, up)
    return linear(p.down, inner, numerics)
