"""Choosing the next token of every row of a batch, on the device, each row by its own parameters.

The draw is Gumbel-max with noise that is a function of (seed, stream, position, token id) alone, so it does
not matter who else is in the batch.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from oxjax.kernels.gumbel_max import gumbel_max
from oxjax.kernels.numerics import Numerics
from oxjax.kernels.row_best import row_best
from oxjax.sampling.edits import Edits, add_edits
from oxjax.sampling.penalties import Penalties, penalize
from oxjax.sampling.stages import Stages, mirostat_after, run_stages

DRAW_STREAM, XTC_STREAM = 0, 1  # uses of a request's seed fold in numbers of their own
NOT_FINITE, NOTHING_LEFT = 1, 2  # faults


@struct.dataclass
class SamplingRows:
    """Parameters per row, `[N]` each; `seeds` holds the high and low 32 bits, `[N, 2]`.

    `positions` are those that the chosen tokens will take in their sequences. `edits`, `penalties`, late edits and
    masks, for rows that are `masked`, change logits before all else. Rows of temperature 0 then take the most likely
    token, whatever their stages. `mus` is what mirostat has come to. Log-probabilities that are reported are those of
    what is drawn from where `reports_final` is set, else of the model.
    """

    seeds: UInt32[Array, "N 2"]
    positions: Int[Array, " N"]
    edits: Edits
    penalties: Penalties
    stages: Stages
    mus: Float[Array, " N"]
    masked: Int[Array, " N"]
    reports_final: Int[Array, " N"]


@struct.dataclass
class Sampled:
    """What was chosen.

    Attributes:
        tokens: chosen ids, `[N]`.
        logprobs: of the chosen ids, float32 `[N]`; of the model's distribution, or of what rows report.
        ranks: their places in the same distribution, from 1, `[N]`; equals rank by id. 0 where nothing is reported.
        top_tokens: the most likely ids, most likely first, lower ids first among equals, `[N, n_top]`.
        top_logprobs: theirs, float32 `[N, n_top]`.
        mus: of mirostat, for the next token, `[N]`.
        faults: 0, `NOT_FINITE` for rows with logits that are not, or `NOTHING_LEFT` to choose from, `[N]`.
    """

    tokens: Int[Array, " N"]
    logprobs: Float[Array, " N"]
    ranks: Int[Array, " N"]
    top_tokens: Int[Array, "N n_top"]
    top_logprobs: Float[Array, "N n_top"]
    mus: Float[Array, " N"]
    faults: Int[Array, " N"]


def sample(
    logits: Float[Array, "N vocab"],
    rows: SamplingRows,
    masks: UInt32[Array, "N words"] | None = None,
    *,
    n_top: int,
    numerics: Numerics,
) -> Sampled:
    """Choose one token per row.

    Args:
        logits: float32.
        rows: each row's parameters.
        masks: bit `i % 32` of word `i // 32` says whether token `i` may be chosen; for rows that are masked.
        n_top: how many of the most likely tokens to report for every row; static.
        numerics: see `Numerics`; activations play no part.
    """
    greedy, largest, log_sum = row_best(logits, numerics=numerics)
    changes = jnp.any(rows.edits.at(rows.positions) != 0.0) | jnp.any(rows.penalties.penalizes)
    changes |= jnp.any(rows.masked > 0)
    draws = rows.stages.temperature > 0.0
    reports = rows.reports_final > 0
    told = partial(report, n_top=n_top, ranks=n_top > 0)

    def change() -> tuple[Array, Array, Array]:
        changed = penalize(add_edits(logits, rows.edits, rows.positions), rows.penalties)
        changed = add_edits(changed, rows.edits, rows.positions, late=True)
        if masks is not None:
            changed = jnp.where(_allowed(masks, logits.shape[1]) | (rows.masked == 0)[:, None], changed, -jnp.inf)
        return changed, *row_best(changed, numerics=numerics)[:2]

    def choose() -> tuple[Array, ...]:
        changed, best, most = lax.cond(changes, change, lambda: (logits, greedy, largest))
        nothing_left = most == -jnp.inf

        def draw() -> tuple[Array, ...]:
            final = _shaped(changed, rows, numerics)
            tokens = jnp.where(draws, gumbel_max(final, _keys(rows, DRAW_STREAM), numerics=numerics), best)
            return tokens, *finish(final, tokens), nothing_left

        return lax.cond(jnp.any(draws), draw, lambda: (best, *finish(changed, best), nothing_left))

    def finish(final: Array, tokens: Array) -> tuple[Array, ...]:
        """Report, and let mirostat learn from what it was."""
        surprising = rows.stages.mirostat > 0
        norm = _normalizers(final, reports | surprising)
        found = final[jnp.arange(len(tokens)), tokens] - norm
        mus = jnp.where(surprising, mirostat_after(rows.mus, found, rows.stages), rows.mus)

        def of_both() -> tuple[Array, ...]:
            source = jnp.where(reports[:, None], final, logits)
            return told(source, tokens, jnp.where(reports, norm, largest), jnp.where(reports, 0.0, log_sum))

        def of_model() -> tuple[Array, ...]:
            return told(logits, tokens, largest, log_sum)

        return *lax.cond(jnp.any(reports), of_both, of_model), mus

    def plain() -> tuple[Array, ...]:
        return greedy, *told(logits, greedy, largest, log_sum), rows.mus, jnp.zeros_like(draws)

    # Outermost, since a branch that hands logits through copies them all.
    tokens, *reported, mus, nothing_left = lax.cond(changes | jnp.any(draws) | jnp.any(reports), choose, plain)
    logprobs, ranks, top_tokens, top_logprobs = reported
    faults = jnp.where(jnp.isfinite(log_sum), jnp.where(nothing_left, NOTHING_LEFT, 0), NOT_FINITE).astype(jnp.int32)
    return Sampled(tokens, logprobs, ranks, top_tokens, top_logprobs, mus, faults)


def _allowed(masks: Array, vocab: int) -> Array:
    bits = masks[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    return bits.reshape(len(masks), -1)[:, :vocab] > 0


def _shaped(logits: Array, rows: SamplingRows, numerics: Numerics) -> Array:
    """The logits that rows draw from; those of rows of temperature 0 as they are."""
    chances = jax.vmap(jax.random.uniform)(jax.random.wrap_key_data(_keys(rows, XTC_STREAM), impl="threefry2x32"))

    def one(row: tuple[Array, Stages, Array, Array]) -> Array:
        logits, stages, chance, mu = row
        shape = partial(run_stages, logits, stages, chance, mu, numerics)
        return lax.cond(stages.temperature > 0.0, shape, lambda: logits)

    return lax.map(one, (logits, rows.stages, chances, rows.mus))


def _normalizers(logits: Array, wanted: Array) -> Array:
    """The logarithm of the sum of exponentials of rows that are wanted."""

    def one(row: tuple[Array, Array]) -> Array:
        logits, wanted = row
        return lax.cond(wanted, lambda: jax.nn.logsumexp(logits), lambda: jnp.float32(0.0))

    return lax.cond(jnp.any(wanted), lambda: lax.map(one, (logits, wanted)), lambda: jnp.zeros(len(logits)))


def report(
    logits: Float[Array, "N vocab"],
    tokens: Int[Array, " N"],
    largest: Float[Array, " N"],
    log_sum: Float[Array, " N"],
    *,
    n_top: int,
    ranks: bool,
) -> tuple[Array, ...]:
    """Log-probabilities and ranks of these tokens, and the most likely tokens with theirs; see `Sampled`.

    Args:
        logits: float32.
        tokens: an id for each row.
        largest, log_sum: of the rows, as from `row_best`.
        n_top: how many.
        ranks: whether they are wanted; else they are 0.
    """
    top_logits, top_tokens = lax.top_k(logits, n_top)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    places = jnp.zeros_like(tokens)
    if ranks:
        first = jnp.arange(logits.shape[1], dtype=jnp.int32) < tokens[:, None]
        places = 1 + jnp.sum((logits > chosen) | ((logits == chosen) & first), axis=-1, dtype=jnp.int32)
    logprobs = jnp.concatenate([chosen, top_logits], axis=-1) - largest[:, None] - log_sum[:, None]
    return logprobs[:, 0], places, top_tokens.astype(jnp.int32), logprobs[:, 1:]


def _keys(rows: SamplingRows, stream: int) -> UInt32[Array, "N 2"]:
    """Of a use of each row's seed, at its position."""

    def key(seed: Array, position: Array) -> Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, stream), position))

    return jax.vmap(key)(rows.seeds, rows.positions)
