"""Gated feed-forward networks (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

from functools import partial

import jax
from flax import struct
from jaxtyping import Array, Float

from oxjax.models.layers.linear import Linear, linear

# GELU is the tanh approximation in every GGUF architecture that says GELU.
ACTIVATIONS = {"silu": jax.nn.silu, "gelu": partial(jax.nn.gelu, approximate=True)}


@struct.dataclass
class MLP:
    """Gate and up `[d_model, d_ff]`, down `[d_ff, d_model]`."""

    gate: Linear
    up: Linear
    down: Linear


def gated_mlp(p: MLP, x: Float[Array, "rows d"], *, activation: str, exact: bool) -> Float[Array, "rows d"]:
    """down(act(gate x) · up x)."""
    gate, up = linear(p.gate, p.up, x=x, exact=exact)
    return linear(p.down, x=ACTIVATIONS[activation](gate) * up, exact=exact)[0]
