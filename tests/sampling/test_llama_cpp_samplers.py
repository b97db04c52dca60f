"""Stages of the pipeline against llama.cpp's samplers, on the same logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llama_cpp_samplers import apply
from test_pipeline import columns

from oxjax import SamplingParams
from oxjax.sampling.dry import Dry
from oxjax.sampling.edits import Edits, add_edits
from oxjax.sampling.penalties import Penalties, penalize
from oxjax.sampling.stages import mirostat_after, run_stages
from oxjax.tokenizer import Tokenizer

VOCAB, CASES = 40, 2000


@pytest.fixture(scope="module")
def logits():
    """Normal ones, some equal, some zero, some forbidden."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(CASES, VOCAB)).astype(np.float32) * 4
    rows[::3] = np.round(rows[::3])
    rows[:, ::7] = np.where(rng.random((CASES, len(range(0, VOCAB, 7)))) < 0.2, -np.inf, rows[:, ::7])
    return rows


def test_penalties(logits):
    rng = np.random.default_rng(1)
    window = rng.choice([0, 1, 5, 31, 32], CASES).astype(np.int32)
    repetition = rng.choice([1.0, 1.1, 0.8, 3.0], CASES).astype(np.float32)
    frequency = rng.choice([0.0, 0.3, -0.5], CASES).astype(np.float32)
    presence = rng.choice([0.0, 1.5, -0.25], CASES).astype(np.float32)
    recent = rng.integers(0, VOCAB // 2, (CASES, 32)).astype(np.int32)
    recent[::4, :20] = -1  # short texts
    given = Penalties(*map(jnp.asarray, (window, repetition, frequency, presence, recent)))
    got = np.asarray(jax.jit(penalize)(jnp.asarray(logits), given))
    numbers = zip(window.tolist(), repetition.tolist(), frequency.tolist(), presence.tolist(), recent, strict=True)
    cases = [{"sampler": "penalties", "args": [VOCAB, *n], "accepted": r[r >= 0].tolist()} for *n, r in numbers]
    # Either side may round a product and the sum it is part of once or twice.
    np.testing.assert_allclose(got, apply(logits, cases), rtol=3e-7, atol=1e-6)


STAGE_CASES = [
    ("top_k", [{"top_k": k} for k in (1, 3, 39, 40, 100)], lambda p: [p.top_k]),
    ("top_p", [{"top_p": x} for x in (0.1, 0.5, 0.9, 0.999)], lambda p: [p.top_p, 1]),
    ("min_p", [{"min_p": x} for x in (0.01, 0.2, 1.0)], lambda p: [p.min_p, 1]),
    ("typical", [{"typical_p": x} for x in (0.2, 0.6, 0.95)], lambda p: [p.typical_p, 1]),
    ("top_n_sigma", [{"top_n_sigma": x} for x in (0.3, 1.0, 2.5)], lambda p: [p.top_n_sigma]),
    ("temp", [{"temperature": x} for x in (0.2, 0.7, 1.5, 9.0)], lambda p: [p.temperature]),
    (
        "temp_ext",
        [
            {"temperature": t, "temperature_range": r, "temperature_exponent": e}
            for t, r, e in [(1.0, 0.5, 1.0), (0.7, 0.9, 2.0)]
        ],
        lambda p: [p.temperature, p.temperature_range, p.temperature_exponent],
    ),
    (
        "xtc",
        [{"xtc_probability": 1.0, "xtc_threshold": x} for x in (0.02, 0.1, 0.3)],
        lambda p: [1.0, p.xtc_threshold, 1, 7],
    ),
]


@pytest.mark.parametrize("sampler,settings,args", STAGE_CASES, ids=[name for name, *_ in STAGE_CASES])
def test_stages(logits, sampler, settings, args):
    """Who is left is the same, and their logits but for a constant, which changes no probability.

    llama.cpp leaves open which of several equal tokens goes; there as many must be left, with the same logits.
    """
    if sampler in ("typical", "temp_ext"):  # whose entropies there do not know of forbidden tokens
        logits = np.where(logits == -np.inf, np.float32(-1.5), logits)
    params = [SamplingParams(**settings[i % len(settings)]) for i in range(CASES)]
    chance = jnp.zeros(CASES)  # llama.cpp draws its own: both are below 1
    run = jax.jit(jax.vmap(run_stages))
    got = np.asarray(run(jnp.asarray(logits), columns(params, CASES), chance, chance))
    expected = apply(logits, [{"sampler": sampler, "args": args(p), "accepted": []} for p in params])
    got, expected = (x - x.max(axis=1, keepdims=True) for x in (got, expected))
    is_tied = np.array([len(set(row[row > -np.inf])) < (row > -np.inf).sum() for row in logits])
    # Where a bound is met to the last bit, sums in another order may fall on its other side.
    differ = ((got > -np.inf) != (expected > -np.inf)).any(axis=1) & ~is_tied
    assert differ.sum() <= CASES // 500
    alike = ~differ & ~is_tied
    # Nearly certain rows have a dynamic temperature near 0, as inexact as the sum of tiny terms that it comes from.
    rtol = 1e-3 if sampler == "temp_ext" else 1e-5
    np.testing.assert_allclose(got[alike], expected[alike], rtol=rtol, atol=1e-5)
    if sampler != "typical":  # there equal surprise may be that of different logits
        left, right = (np.sort(x[is_tied], axis=1) for x in (got, expected))
        same = ((left > -np.inf) == (right > -np.inf)).all(axis=1)
        assert (~same).sum() <= CASES // 500
        np.testing.assert_allclose(left[same], right[same], rtol=rtol, atol=1e-5)


def test_biases(logits):
    rng = np.random.default_rng(2)
    ids = np.stack([rng.permutation(VOCAB)[:6] for _ in range(CASES)]).astype(np.int32)
    values = rng.choice([0.0, 2.5, -3.0, -np.inf], ids.shape).astype(np.float32)
    edits = Edits(
        jnp.asarray(ids), jnp.full(ids.shape, 1, jnp.int32), jnp.asarray(values), jnp.zeros(ids.shape, jnp.int32)
    )
    got = np.asarray(jax.jit(add_edits)(jnp.asarray(logits), edits, jnp.zeros(CASES, jnp.int32)))
    pairs = [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    cases = [{"sampler": "logit_bias", "args": p, "accepted": []} for p in pairs]
    np.testing.assert_array_equal(got, apply(logits, cases))


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat(logits, version):
    """Who is left after three tokens, each of which moved mu: by the surprise of the tokens chosen there."""
    rounds = 4
    if version == 1:  # whose fit there does not know of forbidden tokens
        logits = logits[(logits > -np.inf).all(axis=1)]
    logits = logits[[len(set(row)) == VOCAB for row in np.where(logits == -np.inf, np.float32(-1.5), logits)]]
    n = len(logits)
    kinds = [(1.0, 0.3), (2.5, 1.0), (4.0, 0.1)]
    params = [
        SamplingParams(mirostat=version, mirostat_tau=tau, mirostat_eta=eta)
        for tau, eta in (kinds[i % 3] for i in range(n))
    ]
    cases = [
        {
            "sampler": "mirostat" if version == 1 else "mirostat_v2",
            "args": [VOCAB, i, p.mirostat_tau, p.mirostat_eta, 100]
            if version == 1
            else [i, p.mirostat_tau, p.mirostat_eta],
            "accepted": [],
            "rounds": rounds,
        }
        for i, p in enumerate(params)
    ]
    given = apply(logits, cases)
    expected, chosen = given[:, :VOCAB], given[:, VOCAB:].astype(int)
    stages, x = columns(params, n), jnp.asarray(logits)
    run = jax.jit(jax.vmap(run_stages))
    mus = jnp.asarray([2.0 * p.mirostat_tau for p in params], jnp.float32)
    for i in range(rounds):
        left = run(x, stages, jnp.zeros(n), mus)
        found = jax.nn.log_softmax(left)[jnp.arange(n), chosen[:, i]]
        mus = mirostat_after(mus, found, stages)
    # Where a bound is met to the last bit, the other order of sums may fall on its other side, and mu moves with it.
    differ = ((np.asarray(left) > -np.inf) != (expected > -np.inf)).any(axis=1)
    assert differ.sum() <= n // 200
    assert len({tuple(row > -np.inf) for row in expected}) > n // 3


def test_repetitions(data):
    """DRY's penalties after texts of few words, with breakers within and across what repeats."""
    path = data / "models" / "stories260K" / "stories260K.gguf"
    tokenizer = Tokenizer.from_gguf(path)
    rng = np.random.default_rng(7)
    n, vocab = 600, len(tokenizer.vocab_bytes())
    some = [i for i, b in enumerate(tokenizer.vocab_bytes()) if i > 258][:7]
    breakers = [tokenizer.encode(t, add_special=False)[-1] for t in ("\n", '"')]
    cases, got = [], np.zeros((n, vocab), np.float32)
    for i in range(n):
        alphabet = rng.permutation(some)[: rng.integers(1, 7)].tolist() + breakers * int(rng.random() < 0.3)
        tokens = rng.choice(alphabet, rng.integers(1, 200)).tolist()
        p = SamplingParams(
            dry_multiplier=float(rng.uniform(0.1, 3)),
            dry_base=float(rng.uniform(1.01, 3)),
            dry_allowed_length=int(rng.integers(1, 6)),
            dry_window=[None, int(rng.integers(1, 250))][int(rng.integers(2))],
        )
        dry = Dry(p, tokenizer.token_bytes)
        for token in tokens:
            dry.push(token)
        for token, penalty in dry.penalties(tokens):
            got[i, token] -= np.float32(penalty)
        window = 4096 if p.dry_window is None else p.dry_window
        args = [p.dry_multiplier, p.dry_base, p.dry_allowed_length, window, p.dry_breakers]
        cases.append({"sampler": "dry", "args": args, "accepted": tokens, "vocab": str(path)})
    # What overflows there stays finite here: no penalty forbids.
    expected = np.maximum(apply(np.zeros((n, vocab), np.float32), cases), np.finfo(np.float32).min)
    assert (expected < 0).any(axis=1).mean() > 0.4
    np.testing.assert_allclose(got, expected, rtol=1e-5)
