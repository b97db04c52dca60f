"""The stages that shape a row's distribution before the draw, each a function of the logits that are left.

A row at a time: a stage that a row does not ask for costs it nothing, and what a row gets cannot depend on others.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from oxjax.kernels.keep_top_mass import keep_top_k, keep_top_mass, keep_top_p
from oxjax.kernels.numerics import Numerics

_ZIPF = 100  # tokens that mirostat's first version fits, as its authors do


@struct.dataclass
class Stages:
    """Parameters per row, as `SamplingParams` has them, `[N]` each, or of one row.

    Attributes:
        order: the stages to run, by their places in `STAGES`, `[N, S]`.
        n_stages: how many of them.
    """

    order: Int[Array, "*N S"]
    n_stages: Int[Array, "*N"]
    temperature: Float[Array, "*N"]
    temperature_range: Float[Array, "*N"]
    temperature_exponent: Float[Array, "*N"]
    top_k: Int[Array, "*N"]
    mirostat: Int[Array, "*N"]
    typical_p: Float[Array, "*N"]
    top_p: Float[Array, "*N"]
    min_p: Float[Array, "*N"]
    top_a: Float[Array, "*N"]
    epsilon_cutoff: Float[Array, "*N"]
    eta_cutoff: Float[Array, "*N"]
    top_n_sigma: Float[Array, "*N"]
    xtc_probability: Float[Array, "*N"]
    xtc_threshold: Float[Array, "*N"]
    mirostat_tau: Float[Array, "*N"]
    mirostat_eta: Float[Array, "*N"]


Logits = Float[Array, " V"]  # of one row, by token id; -inf for tokens that are out


class StageInputs(NamedTuple):
    """Inputs of a stage besides logits and parameters.

    Attributes:
        uniform: a uniform draw from [0, 1), for stages that act at random.
        mu: mirostat's maximum surprise, in bits.
        numerics: only the backend matters.
    """

    uniform: Float[Array, ""]
    mu: Float[Array, ""]
    numerics: Numerics


def _only(x: Logits, stays: Bool[Array, " V"]) -> Logits:
    return jnp.where(stays, x, -jnp.inf)


def _keep(x: Logits, stays: Bool[Array, " V"]) -> Logits:
    """Those that stay, and in any case the most likely."""
    return _only(x, stays | (x == jnp.max(x)))


def _probabilities(x: Logits) -> Float[Array, " V"]:
    weights = jnp.exp(x - jnp.max(x))
    return weights / jnp.sum(weights)


def _surprise(p: Float[Array, " V"]) -> Float[Array, " V"]:
    """In nats; 0 for what is impossible."""
    return -jnp.log(jnp.where(p > 0.0, p, 1.0))


def _entropy(p: Float[Array, " V"]) -> Float[Array, ""]:
    """In nats."""
    return jnp.sum(p * _surprise(p))


def temperature(x: Logits, s: Stages, inputs: StageInputs) -> Logits:
    """Divides logits; with a range, by what the entropy asks for within it (llama.cpp's dynamic temperature)."""

    def dynamic() -> Array:
        least = jnp.maximum(s.temperature - s.temperature_range, 0.0)
        most = s.temperature + s.temperature_range
        alive = jnp.sum(x > -jnp.inf).astype(jnp.float32)
        share = jnp.clip(_entropy(_probabilities(x)) / jnp.log(jnp.maximum(alive, 2.0)), 0.0, 1.0)
        return jnp.where(alive > 1.0, least + (most - least) * share**s.temperature_exponent, s.temperature)

    by = lax.cond(s.temperature_range > 0.0, dynamic, lambda: s.temperature)
    # Towards 0 all but the most likely go to -inf, as they should: a difference is divided, so none overflows to inf.
    return lax.cond(by > 1e-3, lambda: x / by, lambda: (x - jnp.max(x)) / jnp.maximum(by, 1e-6))


def top_k(x: Logits, s: Stages, inputs: StageInputs) -> Logits:
    """The k most likely."""
    return keep_top_k(x, s.top_k.astype(jnp.float32), numerics=inputs.numerics)


def typical_p(x: Logits, s: Stages, inputs: StageInputs) -> Logits:
    """Those whose surprise is closest to the entropy, until they hold more than the share (Meister et al. 2023)."""
    p = _probabilities(x)
    near = jnp.where(p > 0.0, -jnp.abs(_surprise(p) - _entropy(p)), -jnp.inf)
    return keep_top_mass(x, near, p, jnp.nextafter(s.typical_p, jnp.float32(2.0)), numerics=inputs.numerics)


def top_p(x: Logits, s: Stages, inputs: StageInputs) -> Logits:
    """The most likely, until they hold the share."""
    return keep_top_p(x, s.top_p, numerics=inputs.numerics)


def min_p(x: Logits, s: Stages, inputs: StageInputs) -> Logits:
    """Those at least so likely relative to the most likely."""
    return _keep(x, x >= jnp.max(x) + jnp.log(s.min_p))


def top_a(x: Logits, s: Stages, inputs: StageInputs) -> Logits:
    """Those at least as likely as a times the square of the largest probability."""
    p = _probabilities(x)
    return _keep(x, p >= s.top_a * jnp.max(p) ** 2)


def epsilon_cutoff(x: Logits, s: Stages, inputs: StageInputs) -> Logits:
    """Those at least so likely (Hewitt et al. 2022)."""
    return _keep(x, _probabilities(x) >= s.epsilon_cutoff)


def eta_cutoff(x: Logits, s: Stages, inputs: StageInputs) -> Logits:
    """Those at least so likely, or less where the entropy is large (Hewitt et al. 2022)."""
    p = _probabilities(x)
    return _keep(x, p >= jnp.minimum(s.eta_cutoff, jnp.sqrt(s.eta_cutoff) * jnp.exp(-_entropy(p))))


def top_n_sigma(x: Logits, s: Stages, inputs: StageInputs) -> Logits:
    """Those whose logits are within n standard deviations of the largest (Tang et al. 2024)."""
    alive = x > -jnp.inf
    n = jnp.sum(alive).astype(jnp.float32)
    off = jnp.where(alive, x - jnp.sum(jnp.where(alive, x, 0.0)) / n, 0.0)
    return _keep(x, x >= jnp.max(x) - s.top_n_sigma * jnp.sqrt(jnp.sum(off * off) / n))


def xtc(x: Logits, s: Stages, inputs: StageInputs) -> Logits:
    """At times, of those above the threshold only the least likely stays, the highest id among equals."""

    def excluded() -> Logits:
        p = _probabilities(x)
        above = p >= s.xtc_threshold
        last = above & (p == jnp.min(jnp.where(above, p, jnp.inf)))
        ids = jnp.arange(len(x), dtype=jnp.int32)
        return _only(x, ~above | (last & (ids == jnp.max(jnp.where(last, ids, -1)))))

    return lax.cond(inputs.uniform < s.xtc_probability, excluded, lambda: x)


def mirostat_1(x: Logits, s: Stages, inputs: StageInputs) -> Logits:
    """As many of the most likely as Zipf's law, fitted to the first hundred, gives for the surprise (Basu et al.)."""
    vocab = len(x)
    # The barrier keeps XLA from sorting everything for a slice of the largest.
    head = lax.optimization_barrier(lax.top_k(x, min(_ZIPF, vocab))[0])
    pairs = head[1:] > -jnp.inf
    t = jnp.where(pairs, jnp.log1p(1.0 / jnp.arange(1, len(head), dtype=jnp.float32)), 0.0)
    slope = jnp.sum(t * jnp.where(pairs, head[:-1] - head[1:], 0.0)) / jnp.sum(t * t)
    epsilon = slope - 1.0
    share = jnp.where(epsilon == 0.0, 1.0 / jnp.log(vocab), epsilon / -jnp.expm1(-epsilon * jnp.log(vocab)))
    k = jnp.exp2((inputs.mu + jnp.log2(share)) / slope)
    k = jnp.floor(jnp.clip(jnp.where(jnp.isnan(k), 1.0, k), 1.0, vocab))
    return keep_top_k(x, k, numerics=inputs.numerics)


def mirostat_2(x: Logits, s: Stages, inputs: StageInputs) -> Logits:
    """Those whose surprise, in bits, is at most mu."""
    p = _probabilities(x)
    return _keep(x, (p > 0.0) & (_surprise(p) <= inputs.mu * jnp.log(2.0)))


def mirostat_after(mu: Float[Array, "*N"], logprob: Float[Array, "*N"], s: Stages) -> Float[Array, "*N"]:
    """Mirostat's mu after a token of this log-probability: its surprise, in bits, moves towards tau."""
    return mu - s.mirostat_eta * (-logprob / jnp.log(2.0) - s.mirostat_tau)


_FUNCTIONS = (
    temperature,
    top_k,
    typical_p,
    top_p,
    min_p,
    top_a,
    epsilon_cutoff,
    eta_cutoff,
    top_n_sigma,
    xtc,
    mirostat_1,
    mirostat_2,
)


def run_stages(logits: Float[Array, " V"], s: Stages, inputs: StageInputs) -> Float[Array, " V"]:
    """The logits of a row after its stages, by token id; -inf for tokens that are out.

    Args:
        logits: float32, one at least above -inf.
        s: the row's.
        inputs: of its next token.
    """
    branches = [lambda x, f=f: f(x, s, inputs) for f in _FUNCTIONS]
    return lax.fori_loop(0, s.n_stages, lambda i, x: lax.switch(s.order[i], branches, x), logits)
