"""Feed-forward networks, plain (Vaswani et al. 2017) and gated (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from oxjax.config import MLPSpec
from oxjax.models.layers.linear import Linear, linear

ACTIVATIONS = {
    "silu": jax.nn.silu,
    # The tanh approximation in every GGUF architecture that says GELU.
    "gelu": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, https://arxiv.org/abs/2109.08668
}


@struct.dataclass
class MLP:
    """Up `[d_model, d_ff]`, down `[d_ff, d_model]` and, in a gated one, gate `[d_model, d_ff]`."""

    up: Linear
    down: Linear
    gate: Linear | None = None


def mlp(p: MLP, x: Float[Array, "rows d"], spec: MLPSpec, *, exact: bool) -> Float[Array, "rows d"]:
    """down(act(gate x) · up x), or down(act(up x)) without a gate."""
    act = ACTIVATIONS[spec.activation]
    if p.gate is None:
        inner = act(linear(p.up, x=x, exact=exact)[0])
    else:
        gate, up = linear(p.gate, p.up, x=x, exact=exact)
        inner = act(gate) * up
    return linear(p.down, x=inner, exact=exact)[0]
