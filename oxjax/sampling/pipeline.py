"""Choosing the next token of every row of a batch, on the device, each row by its own parameters.

The draw is Gumbel-max with noise that is a function of (seed, stream, position, token id) alone, so it does
not matter who else is in the batch.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

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
from oxjax.sampling.stages import StageInputs, Stages, mirostat_after, run_stages

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
    """Sampled tokens of `N` rows, perhaps with an axis of steps before them.

    Attributes:
        tokens: chosen ids, `[N]`.
        logprobs: of the chosen ids, float32 `[N]`; of the model's distribution, or of what rows report.
        ranks: their places in the same distribution, from 1, `[N]`; equals rank by id. 0 where nothing is reported.
        top_tokens: the most likely ids, most likely first, lower ids first among equals, `[N, n_top]`.
        top_logprobs: theirs, float32 `[N, n_top]`.
        mus: of mirostat, for the next token, `[N]`.
        faults: 0, `NOT_FINITE` for rows with logits that are not, or `NOTHING_LEFT` to choose from, `[N]`.
    """

    tokens: Int[Array, "*N"]
    logprobs: Float[Array, "*N"]
    ranks: Int[Array, "*N"]
    top_tokens: Int[Array, "*N n_top"]
    top_logprobs: Float[Array, "*N n_top"]
    mus: Float[Array, "*N"]
    faults: Int[Array, "*N"]


class Report(NamedTuple):
    """Log-probabilities of chosen tokens and of the most likely ones; the fields are those of `Sampled`."""

    logprobs: Float[Array, " N"]
    ranks: Int[Array, " N"]
    top_tokens: Int[Array, "N n_top"]
    top_logprobs: Float[Array, "N n_top"]


class _Model(NamedTuple):
    """The model's distribution for rows: logits, the most likely token, its logit, and log(sum of e^(x − it))."""

    logits: Float[Array, "N vocab"]
    best: Int[Array, " N"]
    largest: Float[Array, " N"]
    log_sum: Float[Array, " N"]


def sample(
    logits: Float[Array, "N vocab"],
    rows: SamplingRows,
    masks: UInt32[Array, "N words"] | None = None,
    *,
    n_top: int,
    numerics: Numerics,
) -> Sampled:
    """Choose one token per row.

    Adjusts logits, shapes and draws, reports; each is skipped where no row asks for it.

    Args:
        logits: float32.
        rows: each row's parameters.
        masks: bit `i % 32` of word `i // 32` says whether token `i` may be chosen; for rows that are masked.
        n_top: how many of the most likely tokens to report for every row; static.
        numerics: see `Numerics`; activations play no part.
    """
    model = _Model(logits, *row_best(logits, numerics=numerics))
    adjusts = jnp.any(rows.edits.at(rows.positions) != 0.0) | jnp.any(rows.penalties.penalizes)
    adjusts |= jnp.any(rows.masked > 0)
    draws, reports_final = rows.stages.temperature > 0.0, rows.reports_final > 0

    def adjust_and_choose() -> Sampled:
        adjust = partial(_adjusted, logits, rows, masks, numerics)
        adjusted, best, largest = lax.cond(adjusts, adjust, lambda: (logits, model.best, model.largest))
        finish = partial(_report_and_learn, model, rows, n_top)
        sampled = lax.cond(
            jnp.any(draws),
            lambda: finish(*_draw(adjusted, best, rows, numerics)),
            lambda: finish(adjusted, best),
        )
        return sampled.replace(faults=jnp.where(largest == -jnp.inf, NOTHING_LEFT, 0).astype(jnp.int32))

    def greedy() -> Sampled:
        found = report(logits, model.best, model.largest, model.log_sum, n_top=n_top, ranks=n_top > 0)
        return Sampled(tokens=model.best, **found._asdict(), mus=rows.mus, faults=jnp.zeros_like(model.best))

    # Outermost, since a branch that hands logits through copies them all.
    sampled = lax.cond(adjusts | jnp.any(draws) | jnp.any(reports_final), adjust_and_choose, greedy)
    return sampled.replace(faults=jnp.where(jnp.isfinite(model.log_sum), sampled.faults, NOT_FINITE))


def _adjusted(logits: Array, rows: SamplingRows, masks: Array | None, numerics: Numerics) -> tuple[Array, Array, Array]:
    """Logits with biases, bans, penalties and masks, the most likely token, and its logit."""
    adjusted = penalize(add_edits(logits, rows.edits, rows.positions), rows.penalties)
    adjusted = add_edits(adjusted, rows.edits, rows.positions, late=True)
    if masks is not None:
        allowed = _allowed(masks, logits.shape[1]) | (rows.masked == 0)[:, None]
        adjusted = jnp.where(allowed, adjusted, -jnp.inf)
    return adjusted, *row_best(adjusted, numerics=numerics)[:2]


def _draw(adjusted: Array, best: Array, rows: SamplingRows, numerics: Numerics) -> tuple[Array, Array]:
    """Logits after the stages, and a draw from each row's distribution, or `best` at temperature 0."""
    final = _shaped(adjusted, rows, numerics)
    drawn = gumbel_max(final, _keys(rows, DRAW_STREAM), numerics=numerics)
    return final, jnp.where(rows.stages.temperature > 0.0, drawn, best)


def _report_and_learn(model: _Model, rows: SamplingRows, n_top: int, final: Array, tokens: Array) -> Sampled:
    """Log-probabilities of the model's or of the final distribution, and mirostat's next state; no faults."""
    uses_mirostat, reports_final = rows.stages.mirostat > 0, rows.reports_final > 0
    norm = _normalizers(final, reports_final | uses_mirostat)
    logprobs = final[jnp.arange(len(tokens)), tokens] - norm
    mus = jnp.where(uses_mirostat, mirostat_after(rows.mus, logprobs, rows.stages), rows.mus)
    of = partial(report, n_top=n_top, ranks=n_top > 0)

    def of_both() -> Report:
        source = jnp.where(reports_final[:, None], final, model.logits)
        largest = jnp.where(reports_final, norm, model.largest)
        return of(source, tokens, largest, jnp.where(reports_final, 0.0, model.log_sum))

    def of_model() -> Report:
        return of(model.logits, tokens, model.largest, model.log_sum)

    found = lax.cond(jnp.any(reports_final), of_both, of_model)
    return Sampled(tokens=tokens, **found._asdict(), mus=mus, faults=jnp.zeros_like(tokens))


def _allowed(masks: Array, vocab: int) -> Array:
    bits = masks[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    return bits.reshape(len(masks), -1)[:, :vocab] > 0


def _shaped(logits: Array, rows: SamplingRows, numerics: Numerics) -> Array:
    """The logits that rows draw from; those of rows of temperature 0 as they are."""
    uniforms = jax.vmap(jax.random.uniform)(jax.random.wrap_key_data(_keys(rows, XTC_STREAM), impl="threefry2x32"))

    def one(row: tuple[Array, Stages, Array, Array]) -> Array:
        logits, stages, uniform, mu = row
        shape = partial(run_stages, logits, stages, StageInputs(uniform, mu, numerics))
        return lax.cond(stages.temperature > 0.0, shape, lambda: logits)

    return lax.map(one, (logits, rows.stages, uniforms, rows.mus))


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
) -> Report:
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
    return Report(logprobs[:, 0], places, top_tokens.astype(jnp.int32), logprobs[:, 1:])


def _keys(rows: SamplingRows, stream: int) -> UInt32[Array, "N 2"]:
    """PRNG keys of a stream of each row's seed, at the row's position."""

    def key(seed: Array, position: Array) -> Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, stream), position))

    return jax.vmap(key)(rows.seeds, rows.positions)
