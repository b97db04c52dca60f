"""The stages that shape a row's distribution before the draw, each a function of the candidates that are left.

A row at a time: a stage that a row does not ask for costs it nothing, and what a row gets cannot depend on others.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

BOUND = 1024  # candidates that are selected instead of sorting all, where so many do


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
    typical_p: Float[Array, "*N"]
    top_p: Float[Array, "*N"]
    min_p: Float[Array, "*N"]
    top_a: Float[Array, "*N"]
    epsilon_cutoff: Float[Array, "*N"]
    eta_cutoff: Float[Array, "*N"]
    top_n_sigma: Float[Array, "*N"]
    xtc_probability: Float[Array, "*N"]
    xtc_threshold: Float[Array, "*N"]


@struct.dataclass
class Candidates:
    """The vocabulary of one row.

    Attributes:
        logits: -inf for tokens that are out.
        ids: whose they are.
        is_sorted: whether they come most likely first, lower ids first among equals. Else the ids are 0, 1, 2 ...
    """

    logits: Float[Array, " V"]
    ids: Int[Array, " V"]
    is_sorted: Bool[Array, ""]

    def only(self, stays: Bool[Array, " V"]) -> Candidates:
        """Those that stay."""
        return self.replace(logits=jnp.where(stays, self.logits, -jnp.inf))

    def keep(self, stays: Bool[Array, " V"]) -> Candidates:
        """Those that stay, and in any case the most likely."""
        return self.only(stays | (self.logits == jnp.max(self.logits)))


def _probabilities(c: Candidates) -> Float[Array, " V"]:
    weights = jnp.exp(c.logits - jnp.max(c.logits))
    return weights / jnp.sum(weights)


def _surprise(p: Float[Array, " V"]) -> Float[Array, " V"]:
    """In nats; 0 for what is impossible."""
    return -jnp.log(jnp.where(p > 0.0, p, 1.0))


def _entropy(p: Float[Array, " V"]) -> Float[Array, ""]:
    """In nats."""
    return jnp.sum(p * _surprise(p))


def _in_order(c: Candidates, does: Callable[[Array], Array]) -> Candidates:
    """Sorted. `does` says whether so many of the most likely logits do; the others may then be dropped."""
    vocab = len(c.logits)

    def all_of_them() -> Candidates:
        order = jnp.argsort(-c.logits, stable=True).astype(jnp.int32)
        return Candidates(c.logits[order], order, jnp.bool_(True))

    def selected() -> Candidates:
        most, ids = lax.top_k(c.logits, BOUND)
        pad = (0, vocab - BOUND)
        most, ids = jnp.pad(most, pad, constant_values=-jnp.inf), jnp.pad(ids.astype(jnp.int32), pad)
        return lax.cond(does(most), lambda: Candidates(most, ids, jnp.bool_(True)), all_of_them)

    return lax.cond(c.is_sorted, lambda: c, selected if vocab > BOUND else all_of_them)


def temperature(c: Candidates, s: Stages, chance: Float[Array, ""]) -> Candidates:
    """Divides logits; with a range, by what the entropy asks for within it (llama.cpp's dynamic temperature)."""
    alive = jnp.sum(c.logits > -jnp.inf).astype(jnp.float32)

    def dynamic() -> Array:
        least = jnp.maximum(s.temperature - s.temperature_range, 0.0)
        most = s.temperature + s.temperature_range
        share = jnp.clip(_entropy(_probabilities(c)) / jnp.log(alive), 0.0, 1.0)
        return least + (most - least) * share**s.temperature_exponent

    by = lax.cond((s.temperature_range > 0.0) & (alive > 1.0), dynamic, lambda: s.temperature)
    # Towards 0 all but the most likely go to -inf, as they should: a difference is divided, so none overflows to inf.
    return c.replace(logits=(c.logits - jnp.max(c.logits)) / jnp.maximum(by, 1e-6))


def top_k(c: Candidates, s: Stages, chance: Float[Array, ""]) -> Candidates:
    """The k most likely."""
    c = _in_order(c, lambda _: s.top_k <= BOUND)
    return c.only(jnp.arange(len(c.ids), dtype=jnp.int32) < s.top_k)


def typical_p(c: Candidates, s: Stages, chance: Float[Array, ""]) -> Candidates:
    """Those whose surprise is closest to the entropy, until they hold the share (Meister et al. 2023)."""
    p = _probabilities(c)
    far = jnp.where(p > 0.0, jnp.abs(_surprise(p) - _entropy(p)), jnp.inf)
    order = jnp.argsort(far, stable=True).astype(jnp.int32)
    before = _before(p[order])
    stays = jnp.zeros(len(p), bool).at[order].set((before <= s.typical_p) & (p[order] > 0.0))
    return c.only(stays)


def top_p(c: Candidates, s: Stages, chance: Float[Array, ""]) -> Candidates:
    """The most likely, until they hold the share."""
    largest = jnp.max(c.logits)
    wanted = s.top_p * jnp.sum(jnp.exp(c.logits - largest))
    c = _in_order(c, lambda most: jnp.sum(jnp.exp(most - largest)) >= wanted)
    return c.only(_before(jnp.exp(c.logits - largest)) < wanted)


def _before(mass: Float[Array, " V"]) -> Float[Array, " V"]:
    """What all before each hold together."""
    return jnp.pad(jnp.cumsum(mass)[:-1], (1, 0))


def min_p(c: Candidates, s: Stages, chance: Float[Array, ""]) -> Candidates:
    """Those at least so likely relative to the most likely."""
    return c.keep(c.logits >= jnp.max(c.logits) + jnp.log(s.min_p))


def top_a(c: Candidates, s: Stages, chance: Float[Array, ""]) -> Candidates:
    """Those at least as likely as a times the square of the largest probability."""
    p = _probabilities(c)
    return c.keep(p >= s.top_a * jnp.max(p) ** 2)


def epsilon_cutoff(c: Candidates, s: Stages, chance: Float[Array, ""]) -> Candidates:
    """Those at least so likely (Hewitt et al. 2022)."""
    return c.keep(_probabilities(c) >= s.epsilon_cutoff)


def eta_cutoff(c: Candidates, s: Stages, chance: Float[Array, ""]) -> Candidates:
    """Those at least so likely, or less where the entropy is large (Hewitt et al. 2022)."""
    p = _probabilities(c)
    return c.keep(p >= jnp.minimum(s.eta_cutoff, jnp.sqrt(s.eta_cutoff) * jnp.exp(-_entropy(p))))


def top_n_sigma(c: Candidates, s: Stages, chance: Float[Array, ""]) -> Candidates:
    """Those whose logits are within n standard deviations of the largest (Tang et al. 2024)."""
    alive = c.logits > -jnp.inf
    n = jnp.sum(alive).astype(jnp.float32)
    off = jnp.where(alive, c.logits - jnp.sum(jnp.where(alive, c.logits, 0.0)) / n, 0.0)
    return c.keep(c.logits >= jnp.max(c.logits) - s.top_n_sigma * jnp.sqrt(jnp.sum(off * off) / n))


def xtc(c: Candidates, s: Stages, chance: Float[Array, ""]) -> Candidates:
    """At times, of those above the threshold only the least likely stays, the highest id among equals."""

    def excluded() -> Candidates:
        p = _probabilities(c)
        above = p >= s.xtc_threshold
        last = above & (p == jnp.min(jnp.where(above, p, jnp.inf)))
        return c.only(~above | (last & (c.ids == jnp.max(jnp.where(last, c.ids, -1)))))

    return lax.cond(chance < s.xtc_probability, excluded, lambda: c)


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
)


def run_stages(logits: Float[Array, " V"], s: Stages, chance: Float[Array, ""]) -> Float[Array, " V"]:
    """The logits of a row after its stages, by token id; -inf for tokens that are out.

    Args:
        logits: float32, one at least above -inf.
        s: the row's.
        chance: from 0 to 1, for stages that act at times.
    """
    logits = jnp.where(logits == 0.0, 0.0, logits)  # one zero: sorting and selecting would not agree on two
    start = Candidates(logits, jnp.arange(len(logits), dtype=jnp.int32), jnp.bool_(False))
    branches = [lambda c, f=f: f(c, s, chance) for f in _FUNCTIONS]
    c = lax.fori_loop(0, s.n_stages, lambda i, c: lax.switch(s.order[i], branches, c), start)

    def back() -> Array:  # dropped candidates may stand under id 0
        return jnp.full_like(logits, -jnp.inf).at[c.ids].max(c.logits)

    return lax.cond(c.is_sorted, back, lambda: c.logits)
