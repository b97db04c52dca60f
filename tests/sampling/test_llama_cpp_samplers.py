"""Stages of the pipeline against llama.cpp's samplers, on the same logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llama_cpp_samplers import apply

from oxjax.sampling.edits import Edits, add_edits
from oxjax.sampling.penalties import Penalties, penalize

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


def test_biases(logits):
    rng = np.random.default_rng(2)
    ids = np.stack([rng.permutation(VOCAB)[:6] for _ in range(CASES)]).astype(np.int32)
    values = rng.choice([0.0, 2.5, -3.0, -np.inf], ids.shape).astype(np.float32)
    edits = Edits(jnp.asarray(ids), jnp.full(ids.shape, 1, jnp.int32), jnp.asarray(values))
    got = np.asarray(jax.jit(add_edits)(jnp.asarray(logits), edits, edits.at(jnp.zeros(CASES, jnp.int32))))
    pairs = [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    cases = [{"sampler": "logit_bias", "args": p, "accepted": []} for p in pairs]
    np.testing.assert_array_equal(got, apply(logits, cases))
