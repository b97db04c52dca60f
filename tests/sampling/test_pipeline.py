"""The pipeline against its definitions in float64 NumPy, and its draws against the exact distribution."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oxjax import SamplingParams
from oxjax.kernels.native import resolve_backend
from oxjax.kernels.numerics import Numerics
from oxjax.sampling import stages
from oxjax.sampling.edits import LEAST_EDITS, Edits
from oxjax.sampling.params import ALL_STAGES, STAGES
from oxjax.sampling.penalties import LEAST_RECENT, Penalties, recent_tokens
from oxjax.sampling.pipeline import NOT_FINITE, SamplingRows, sample
from oxjax.sampling.stages import StageInputs, run_stages
from tests.helpers.sampler_cases import columns, shaped

NUMERICS = Numerics(backend=resolve_backend("auto"))
run = jax.jit(partial(sample, numerics=NUMERICS), static_argnames="n_top")


def inputs(mu):
    return StageInputs(jnp.float32(0.0), jnp.float32(mu), NUMERICS)


def edits(n, changes=()):
    """`changes` are (id, until, value), for all rows."""
    ids, until, values = np.array([*changes, *[(0, 0, 0.0)] * (LEAST_EDITS - len(changes))]).T
    kinds = {"ids": (ids, jnp.int32), "until": (until, jnp.int32), "values": (values, jnp.float32)}
    kinds["late"] = np.zeros(LEAST_EDITS), jnp.int32
    return Edits(**{k: jnp.broadcast_to(jnp.asarray(v, t), (n, LEAST_EDITS)) for k, (v, t) in kinds.items()})


RECENT = [9, 2, 3, *[3] * 18, 5]  # the window of 20 begins in the middle of the threes


def rows(n, *, seeds=None, positions=0, changes=(), **settings):
    def column(value, dtype):
        return jnp.broadcast_to(jnp.asarray(value, dtype), (n,))

    seeds, params = np.arange(n) if seeds is None else np.asarray(seeds), SamplingParams(**settings)
    return SamplingRows(
        seeds=jnp.asarray(np.stack([seeds >> 32, seeds & 0xFFFFFFFF], axis=1), jnp.uint32),
        positions=column(positions, jnp.int32),
        edits=edits(n, changes),
        penalties=Penalties(
            window=column(20, jnp.int32),
            repetition=column(params.repetition_penalty, jnp.float32),
            frequency=column(params.frequency_penalty, jnp.float32),
            presence=column(params.presence_penalty, jnp.float32),
            recent=jnp.broadcast_to(jnp.asarray(recent_tokens(RECENT, LEAST_RECENT)), (n, LEAST_RECENT)),
        ),
        stages=columns(params, n),
        mus=column(2.0 * params.mirostat_tau, jnp.float32),
        masked=column(0, jnp.int32),
        reports_final=column(params.logprobs_of == "sampling", jnp.int32),
    )


def distribution(logits, *, changes=(), **settings):
    """The law of the draw."""
    x, p = logits.astype(np.float64), SamplingParams(**settings)
    for token, _, value in changes:
        x[token] += value
    if p.penalizes:
        for token in set(RECENT[-20:]):
            x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
            x[token] -= RECENT[-20:].count(token) * p.frequency_penalty + p.presence_penalty
    for stage in p.stages:
        x = shaped(x, p, stage)
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.5},
    {"temperature": 1.2, "temperature_range": 0.9, "temperature_exponent": 1.5},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 12},
    {"top_k": 500},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"typical_p": 0.5},
    {"typical_p": 0.95, "temperature": 2.0},
    {"top_a": 0.3},
    {"epsilon_cutoff": 0.05},
    {"eta_cutoff": 0.3},
    {"top_n_sigma": 1.0},
    {"temperature": 0.7, "top_k": 8, "top_p": 0.8, "min_p": 0.1},
    {"temperature": 2.0, "top_n_sigma": 1.5, "top_k": 7, "typical_p": 0.9, "top_p": 0.9, "order": STAGES[::-1]},
    {"changes": ((3, 8, 1.5), (4, 8, -0.75), (0, 8, 2.0))},
    {"changes": ((5, 8, -np.inf), (1, 8, 1.0), (1, 8, -np.inf)), "top_p": 0.9},
    {"repetition_penalty": 1.5},
    {"frequency_penalty": 0.05, "presence_penalty": -0.5, "changes": ((5, 8, 2.0),), "top_k": 6},
    {"changes": ((11, 8, 3.0), (2, 8, -np.inf)), "temperature": 0.7, "top_k": 3, "min_p": 0.05},
]

N_DRAWS = 8_000
# 25 settings, each tested at 1e-5: a false alarm in 2.5e-4 of all seeds. The seeds here are fixed.
ALPHA_QUANTILE = 4.265  # of the standard normal, one-sided 1e-5


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_follow_the_distribution(settings):
    """Pearson's chi-square over the surviving tokens, by the Wilson-Hilferty normal approximation."""
    logits = np.random.default_rng(3).normal(size=12).astype(np.float32) * 1.5
    expected = distribution(logits, **settings)
    drawn = run(jnp.broadcast_to(logits, (N_DRAWS, 12)), rows(N_DRAWS, positions=7, **settings), n_top=0)
    counts = np.bincount(drawn.tokens, minlength=12)
    alive = expected > 0
    assert counts[~alive].sum() == 0
    degrees = alive.sum() - 1
    if degrees == 0:
        assert counts[alive].sum() == N_DRAWS
        return
    chi2 = (((counts - N_DRAWS * expected) ** 2)[alive] / (N_DRAWS * expected[alive])).sum()
    z = ((chi2 / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / np.sqrt(2 / (9 * degrees))
    assert z < ALPHA_QUANTILE


def survivors(logits, settings, draws=4000):
    drawn = run(jnp.broadcast_to(logits, (draws, len(logits))), rows(draws, **settings), n_top=0)
    return set(np.unique(drawn.tokens).tolist())


def test_stages_stand_where_their_numbers_say():
    assert tuple(f.__name__ for f in stages._FUNCTIONS) == ALL_STAGES


@pytest.mark.parametrize("vocab", [1023, (1 << 14) + 1])
@pytest.mark.parametrize(
    "settings",
    [{"top_k": 7}, {"top_k": 1025}, {"top_p": 0.4}, {"top_p": 0.99}, {"top_k": 9, "top_p": 0.7}],
    ids=str,
)
def test_selecting_without_sorting(settings, vocab):
    """Peaked and flat rows, with ties: who is left, and with which logit, is what sorting all of them leaves."""
    rng, params = np.random.default_rng(vocab), SamplingParams(**settings)
    for scale in (0.1, 8.0):
        x = np.round(rng.normal(size=vocab) * scale * 4).astype(np.float32) / 4
        one = jax.tree.map(lambda a: a[0], columns(params, 1))
        got, expected = (
            np.asarray(jax.jit(partial(run_stages, inputs=inputs(0.0)))(x, one)),
            x.astype(np.float64),
        )
        for stage in params.stages:
            expected = shaped(expected, params, stage)
        # Sums in float32 may end a share one token sooner or later than sums in float64.
        assert ((got > -np.inf) != (expected > -np.inf)).sum() <= (1 if "top_p" in settings else 0)
        np.testing.assert_array_equal(got[got > -np.inf], x[got > -np.inf])


def test_excluding_top_choices():
    """XTC: always, never, and at times; a threshold that one token alone is above excludes nothing."""
    logits = np.log(np.array([0.05, 0.3, 0.2, 0.2, 0.25], np.float32))
    assert survivors(jnp.asarray(logits), {"xtc_probability": 1.0, "xtc_threshold": 0.1}) == {0, 3}
    assert survivors(jnp.asarray(logits), {"xtc_probability": 1.0, "xtc_threshold": 0.28}) == {0, 1, 2, 3, 4}
    drawn = run(jnp.broadcast_to(logits, (20000, 5)), rows(20000, xtc_probability=0.3), n_top=0)
    excluded = 1 - np.isin(np.asarray(drawn.tokens), [1, 2, 4]).mean() / 0.75
    # The share of a Bernoulli of 0.3 is within 4.5 standard errors but in 7e-6 of all seeds.
    assert abs(excluded - 0.3) < 4.5 * np.sqrt(0.3 / 20000) / 0.75


def test_mirostat_drops_what_is_too_unlikely_for_float32():
    """Its surprise is more than any bound, though its probability is 0 there."""
    logits = jnp.array([200.0, 199.0, 0.0])
    one = jax.tree.map(lambda a: a[0], columns(SamplingParams(mirostat=2), 1))
    assert run_stages(logits, one, inputs(10.0)).tolist() == [200.0, 199.0, -np.inf]


def test_ties_go_to_the_lowest_id():
    logits = jnp.array([0.0, 2.0, 2.0, 2.0, -1.0])
    assert run(logits[None], rows(1, temperature=0.0), n_top=3).tokens.tolist() == [1]
    assert run(logits[None], rows(1, temperature=0.0), n_top=3).top_tokens.tolist() == [[1, 2, 3]]
    assert survivors(logits, {"top_k": 2}) == {1, 2}
    assert survivors(logits, {"top_p": 0.5}) == {1, 2}


def test_top_p_one_keeps_what_float32_sums_lose():
    """The last token is likely enough to be drawn, yet adds nothing to a float32 sum that has reached 1."""
    assert survivors(jnp.array([0.0, -2.0, -4.0]), {"top_p": 1.0, "top_k": 3}) == {0, 1, 2}


def test_temperature_zero_ignores_truncation_and_seed():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32))
    got = run(logits, rows(5, temperature=0.0, top_k=2, top_p=0.1, min_p=1.0), n_top=0)
    assert got.tokens.tolist() == logits.argmax(-1).tolist()


def test_rows_do_not_depend_on_their_neighbours():
    """A row alone, among others with other parameters, and in another place of the batch: same bits."""
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(8, 300)).astype(np.float32))
    settings = [
        {"temperature": 0.0},
        {},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "typical_p": 0.8},
        {"temperature": 2.0, "min_p": 0.1, "xtc_probability": 0.5},
        {"temperature": 0.0, "top_k": 3},
        {"top_k": 40, "top_p": 0.5, "eta_cutoff": 0.1},
        {"temperature": 1.5, "temperature_range": 0.5, "top_a": 0.1},
        {"temperature": 0.3, "top_n_sigma": 2.0, "epsilon_cutoff": 0.01},
    ]
    mixed = SamplingRows(
        seeds=jnp.asarray(rng.integers(0, 2**32, (8, 2)), jnp.uint32),
        positions=jnp.arange(8, dtype=jnp.int32),
        edits=edits(8),
        penalties=Penalties(
            window=jnp.arange(8, dtype=jnp.int32) * 9,
            repetition=jnp.array([1.0, 1.3, 1.0, 0.7, 1.1, 1.0, 2.0, 1.0]),
            frequency=jnp.array([0.1, 0.0, 0.0, 0.3, 0.1, 0.0, 0.7, 1.0]),
            presence=jnp.array([0.2, 0.0, 0.0, 0.1, -0.1, 0.3, 0.0, 1.0]),
            recent=jnp.asarray(rng.integers(-1, 300, (8, LEAST_RECENT)), jnp.int32),
        ),
        stages=columns([SamplingParams(**s) for s in settings], 8),
        mus=jnp.linspace(2.0, 9.0, 8),
        masked=jnp.zeros(8, jnp.int32),
        reports_final=jnp.array([0, 1, 1, 0, 1, 0, 0, 1], jnp.int32),
    )
    ids = jnp.asarray(rng.integers(0, 300, (8, LEAST_EDITS)), jnp.int32)
    until = jnp.asarray(rng.integers(0, 8, (8, LEAST_EDITS)), jnp.int32)  # some rows are past theirs
    mixed = mixed.replace(edits=Edits(ids, until, jnp.asarray(rng.normal(size=ids.shape) * 4, jnp.float32), ids % 2))
    together = run(logits, mixed, n_top=4)
    for i in range(8):
        alone = run(logits[i : i + 1], jax.tree.map(lambda a, i=i: a[i : i + 1], mixed), n_top=4)
        for one, all_ in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_array_equal(one[0], all_[i])


def test_edits_end_at_a_position():
    """What is forbidden before position 5 is chosen from there on, and an edit of nothing changes nothing."""
    logits = jnp.broadcast_to(jnp.array([1.0, 5.0, 3.0]), (4, 3))
    forbidden = rows(4, positions=[0, 4, 5, 6], temperature=0.0, changes=((1, 5, -np.inf), (0, 0, 100.0)))
    assert run(logits, forbidden, n_top=0).tokens.tolist() == [2, 2, 1, 1]


def test_edits_change_the_choice_and_not_what_is_reported():
    logits = jnp.asarray(np.random.default_rng(4).normal(size=(2, 30)).astype(np.float32))
    plain = run(logits, rows(2, temperature=0.0), n_top=4)
    edited = run(logits, rows(2, temperature=0.0, changes=((7, 9, 50.0),)), n_top=4)
    assert edited.tokens.tolist() == [7, 7]
    np.testing.assert_array_equal(edited.top_logprobs, plain.top_logprobs)
    np.testing.assert_allclose(edited.logprobs, jax.nn.log_softmax(logits)[:, 7], rtol=1e-6, atol=1e-6)
    assert not edited.faults.any()


def test_seed_and_position_both_matter():
    logits = jnp.zeros((200, 50))
    base = run(logits, rows(200, seeds=np.full(200, 5), positions=np.arange(200)), n_top=0).tokens
    again = run(logits, rows(200, seeds=np.full(200, 5), positions=np.arange(200)), n_top=0).tokens
    high = run(logits, rows(200, seeds=np.full(200, 5 + (1 << 40)), positions=np.arange(200)), n_top=0).tokens
    assert (base == again).all()
    assert (base == high).mean() < 0.2
    assert len(np.unique(base)) > 20


def test_logprobs_are_of_the_raw_distribution():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(3, 60)).astype(np.float32))
    got = run(logits, rows(3, temperature=0.3, top_k=2), n_top=5)
    expected = np.asarray(jax.nn.log_softmax(logits))
    # One float32 reduction over 60 terms on either side.
    np.testing.assert_allclose(got.logprobs, expected[np.arange(3), got.tokens], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.top_logprobs, np.sort(expected)[:, :-6:-1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_rows_are_flagged_and_alone(bad):
    logits = np.zeros((3, 10), np.float32)
    logits[1, 4] = bad
    assert run(jnp.asarray(logits), rows(3), n_top=0).faults.tolist() == [0, NOT_FINITE, 0]


def test_a_vocabulary_of_one():
    assert run(jnp.zeros((1, 1)), rows(1, top_k=5, top_p=0.5, min_p=0.5), n_top=1).tokens.tolist() == [0]
