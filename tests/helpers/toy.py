"""A tiny model with recurrent layers, so that the law is held for them before any architecture brings them.

A causal convolution over the last inputs, then a gated linear recurrence, token by token: elementwise all the way,
so its bits cannot depend on how tokens were cut.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from oxjax.cache.slots import RecurrentState, read_slots, write_slots
from oxjax.config import AttentionSpec, LayerSpec, ModelConfig, RecurrentSpec
from oxjax.kernels.native import resolve_backend
from oxjax.kernels.numerics import Numerics
from oxjax.models.decoder import Params
from oxjax.models.layers.attention import Attention, attention
from oxjax.models.layers.linear import Linear, linear, linears
from oxjax.models.layers.norms import Norm, rms_norm
from oxjax.models.layers.rope import RopeSpec
from oxjax.models.load import Model

D, HEADS, KERNEL = 32, 4, 4


@struct.dataclass
class Recurrence:
    inputs: Linear
    gate: Linear
    out: Linear
    taps: jax.Array


@struct.dataclass
class Layer:
    """A block: every mixer on the same normalised rows, around one residual."""

    norm: Norm
    mixers: tuple

    def apply(self, x, state, spec, ctx):
        normed = rms_norm(self.norm, x, eps=ctx.config.norm_eps, numerics=ctx.config.numerics)
        new = []
        for weights, kind, old in zip(self.mixers, spec.mixers, state, strict=True):
            if isinstance(kind, RecurrentSpec):
                mixed, updated = recurrence(weights, normed, old, ctx.layout, ctx.config.numerics)
            else:
                mixed, updated = attention(weights, normed, old, kind, ctx)
            x = x + mixed
            new.append(updated)
        return x, tuple(new)


def recurrence(p, x, state, layout, numerics):
    """h = a h + conv(u) with a = sigmoid(gate x), u = inputs x; the output is h."""
    inputs, gates = linears((p.inputs, p.gate), x, numerics)
    begin = read_slots(state, layout)

    def one_row(carry, row):
        window, h = carry
        u, a, s, real = row
        taken = jnp.concatenate([window[s], u[None]])
        mixed = sum(taken[j] * p.taps[j] for j in range(KERNEL))
        new = a * h[s, 0] + (1.0 - a) * mixed
        window = window.at[s].set(jnp.where(real, taken[1:], window[s]))
        h = h.at[s, 0].set(jnp.where(real, new, h[s, 0]))
        return (window, h), new

    rows = (inputs, jax.nn.sigmoid(gates), layout.row_seq, layout.is_real)
    (window, h), mixed = lax.scan(one_row, (begin.conv, begin.ssm), rows)
    state = write_slots(state, RecurrentState(conv=window, ssm=h), layout)
    return linear(p.out, mixed, numerics), state


RECURRENT = RecurrentSpec(conv=(KERNEL - 1, D), ssm=(1, D))
ATTENTION = AttentionSpec(n_heads=HEADS, n_kv_heads=2, key_dim=D // HEADS, value_dim=D // HEADS, scale=0.35)
LAYERS = {
    "recurrent": ((RECURRENT,), (RECURRENT,)),
    "hybrid": ((RECURRENT,), (ATTENTION,), (ATTENTION, RECURRENT)),
}


def toy_model(kind, tokenizer, *, exact=True, backend="auto"):
    """A random model of a kind, with somebody's tokenizer."""
    rng = np.random.default_rng(0)

    def matrix(d_in, d_out):
        return Linear(weight=jnp.asarray(rng.standard_normal((d_in, d_out), np.float32) / d_in**0.5), bias=None)

    def mixer(spec):
        if isinstance(spec, RecurrentSpec):
            taps = jnp.asarray(rng.standard_normal((KERNEL, D), np.float32))
            return Recurrence(inputs=matrix(D, D), gate=matrix(D, D), out=matrix(D, D), taps=taps)
        kv = spec.n_kv_heads * spec.key_dim
        return Attention(q=matrix(D, D), k=matrix(D, kv), v=matrix(D, kv), out=matrix(D, D))

    norm = Norm(weight=jnp.ones(D))
    config = ModelConfig(
        architecture="toy",
        vocab_size=tokenizer.vocab_size,
        d_model=D,
        context_length=1024,
        norm_eps=1e-5,
        layers=tuple(LayerSpec(mixers) for mixers in LAYERS[kind]),
        ropes=(RopeSpec(dim=D // HEADS, pairing="neox", mscale=1.0),),
        numerics=Numerics(exact=exact, backend=resolve_backend(backend)),
    )
    params = Params(
        embedding=jnp.asarray(rng.standard_normal((config.vocab_size, D), np.float32)),
        layers=tuple(Layer(norm=norm, mixers=tuple(map(mixer, mixers))) for mixers in LAYERS[kind]),
        final_norm=norm,
        output=None,
        rope_inv_freq=(jnp.asarray(10000.0 ** -np.linspace(0, 1, D // HEADS // 2, dtype=np.float32)),),
    )
    return Model(config=config, params=params, tokenizer=tokenizer)
