"""Choosing the next token of every row of a batch, on the device, each row by its own parameters.

The draw is Gumbel-max with noise that is a function of (seed, stream, position, token id) alone, so it does
not matter who else is in the batch.
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
from oxjax.sampling.stages import Stages, run_stages

DRAW_STREAM, XTC_STREAM = 0, 1  # uses of a request's seed fold in numbers of their own


@struct.dataclass
class SamplingRows:
    """Parameters per row, `[N]` each; `seeds` holds the high and low 32 bits, `[N, 2]`.

    `positions` are those that the chosen tokens will take in their sequences; `edits` and then `penalties` change their
    logits before all else. Rows of temperature 0 take the most likely token, whatever their stages.
    """

    seeds: UInt32[Array, "N 2"]
    positions: Int[Array, " N"]
    edits: Edits
    penalties: Penalties
    stages: Stages


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
    changes = jnp.any(rows.edits.at(rows.positions) != 0.0) | jnp.any(rows.penalties.penalizes)
    draws = rows.stages.temperature > 0.0

    def change() -> tuple[Array, Array]:
        changed = penalize(add_edits(logits, rows.edits, rows.positions), rows.penalties)
        return changed, row_best(changed, exact=exact)[0]

    def choose() -> Array:
        changed, best = lax.cond(changes, change, lambda: (logits, greedy))
        return lax.cond(jnp.any(draws), lambda: jnp.where(draws, _draw(changed, rows), best), lambda: best)

    # Outermost, since a branch that hands logits through copies them all.
    tokens = lax.cond(changes | jnp.any(draws), choose, lambda: greedy)
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
    """A token from each row's distribution; 0 for rows of temperature 0."""

    def one(row: tuple[Array, Array, Array, Stages]) -> Array:
        logits, seed, position, stages = row

        def drawn() -> Array:
            chance = jax.random.uniform(_key(seed, XTC_STREAM, position))
            noise = jax.random.gumbel(_key(seed, DRAW_STREAM, position), logits.shape, jnp.float32, mode="high")
            return jnp.argmax(run_stages(logits, stages, chance) + noise).astype(jnp.int32)

        return lax.cond(stages.temperature > 0.0, drawn, lambda: jnp.int32(0))

    return lax.map(one, (logits, rows.seeds, rows.positions, rows.stages))


def _key(seed: Array, stream: int, position: Array) -> Array:
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, stream), position)
