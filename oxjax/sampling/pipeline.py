"""Choosing the next token of every row of a batch, on the device, each row by its own parameters.

The draw is Gumbel-max with noise that is a function of (seed, stream, position, token id) alone, so it does
not matter who else is in the batch. Truncation keeps a prefix of the vocabulary sorted by (probability
descending, id ascending); rows that truncate nothing cost no sort unless a neighbour does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from oxjax.kernels.row_best import row_best
from oxjax.sampling.edits import Edits, add_edits
from oxjax.sampling.penalties import Penalties, penalize

DRAW_STREAM = 0  # other uses of a request's seed fold in other numbers


@struct.dataclass
class SamplingRows:
    """Parameters per row, `[N]` each; `seeds` holds the high and low 32 bits, `[N, 2]`.

    `positions` are those that the chosen tokens will take in their sequences; `edits` and then `penalties` change their
    logits before all else.
    """

    seeds: UInt32[Array, "N 2"]
    positions: Int[Array, " N"]
    temperature: Float[Array, " N"]
    top_k: Int[Array, " N"]
    top_p: Float[Array, " N"]
    min_p: Float[Array, " N"]
    edits: Edits
    penalties: Penalties


@struct.dataclass
class Sampled:
    """What was chosen. Log-probabilities are of the raw distribution: log-softmax of the logits.

    Attributes:
        tokens: chosen ids, `[N]`.
        logprobs: of the chosen ids, float32 `[N]`.
        top_tokens: the most likely ids, most likely first, lower ids first among equals, `[N, n_top]`.
        top_logprobs: theirs, float32 `[N, n_top]`.
        finite: whether all logits of the row were, `[N]`.
    """

    tokens: Int[Array, " N"]
    logprobs: Float[Array, " N"]
    top_tokens: Int[Array, "N n_top"]
    top_logprobs: Float[Array, "N n_top"]
    finite: Bool[Array, " N"]


def sample(logits: Float[Array, "N vocab"], rows: SamplingRows, *, n_top: int, exact: bool) -> Sampled:
    """Choose one token per row.

    Args:
        logits: float32.
        rows: each row's parameters.
        n_top: how many of the most likely tokens to report for every row; static.
        exact: log-probabilities do not depend on the number of rows, to the bit.
    """
    greedy, largest, log_sum = row_best(logits, exact=exact)
    added, penalties = rows.edits.at(rows.positions), rows.penalties
    changed = penalize(add_edits(logits, rows.edits, added), penalties)
    changes = jnp.any(added != 0.0) | jnp.any(penalties.penalizes)
    greedy = lax.cond(changes, lambda: row_best(changed, exact=exact)[0], lambda: greedy)
    tokens = lax.cond(
        jnp.any(rows.temperature > 0.0),
        lambda: jnp.where(rows.temperature > 0.0, _draw(changed, rows), greedy),
        lambda: greedy,
    )
    top_logits, top_tokens = lax.top_k(logits, n_top)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    logprobs = jnp.concatenate([chosen, top_logits], axis=-1) - largest[:, None] - log_sum[:, None]
    return Sampled(
        tokens=tokens,
        logprobs=logprobs[:, 0],
        top_tokens=top_tokens.astype(jnp.int32),
        top_logprobs=logprobs[:, 1:],
        finite=jnp.isfinite(log_sum),
    )


def _draw(logits: Array, rows: SamplingRows) -> Array:
    """A token from each row's truncated distribution; rows of temperature 0 are computed and not used."""
    temperature = jnp.where(rows.temperature > 0.0, rows.temperature, 1.0)
    scaled = logits / temperature[:, None]
    best = jnp.max(scaled, axis=-1, keepdims=True)
    keep = scaled >= best + jnp.log(rows.min_p)[:, None]  # log 0 is -inf: keeps all
    truncates = (rows.temperature > 0.0) & ((rows.top_k > 0) | (rows.top_p < 1.0))
    keep &= lax.cond(jnp.any(truncates), lambda: _top_k_top_p(scaled - best, rows), lambda: jnp.ones_like(keep))
    noise = jax.vmap(_gumbel_row, in_axes=(0, 0, None))(rows.seeds, rows.positions, logits.shape[-1])
    return jnp.argmax(jnp.where(keep, scaled + noise, -jnp.inf), axis=-1).astype(jnp.int32)


def _top_k_top_p(shifted: Array, rows: SamplingRows) -> Array:
    """Which tokens survive top-k and then top-p, given logits shifted to a maximum of 0."""
    vocab = shifted.shape[-1]
    order = jnp.argsort(-shifted, axis=-1, stable=True).astype(jnp.int32)
    ordered = jnp.take_along_axis(shifted, order, axis=-1)
    k = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, vocab), vocab)[:, None]
    rank = jnp.arange(vocab, dtype=jnp.int32)
    mass = jnp.where(rank < k, jnp.exp(ordered), 0.0)
    until_here = jnp.cumsum(mass, axis=-1)
    # A token stays while the more likely ones hold less than the share; top_p 1 must keep even those that
    # add nothing to a float32 sum.
    wanted = rows.top_p[:, None] * until_here[:, -1:]
    before = jnp.pad(until_here[:, :-1], ((0, 0), (1, 0)))
    stays = (rank < k) & ((before < wanted) | (rows.top_p >= 1.0)[:, None])
    last = jnp.maximum(jnp.sum(stays, axis=-1, keepdims=True) - 1, 0)
    last_value = jnp.take_along_axis(ordered, last, axis=-1)
    last_id = jnp.take_along_axis(order, last, axis=-1)
    ids = jnp.arange(vocab, dtype=jnp.int32)
    return (shifted > last_value) | ((shifted == last_value) & (ids <= last_id))


def _gumbel_row(seed: Array, position: Array, vocab: int) -> Array:
    """Noise of one row: one number per token id, from (seed, stream, position) alone."""
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    key = jax.random.fold_in(jax.random.fold_in(key, DRAW_STREAM), position)
    return jax.random.gumbel(key, (vocab,), jnp.float32, mode="high")
