"""Selection by weight, against sorting in float64."""

import jax
import numpy as np
import pytest

from oxjax.kernels.keep_top_mass import keep_top_k, keep_top_mass, keep_top_p

run, run_count, run_share = (jax.jit(f, static_argnames="numerics") for f in (keep_top_mass, keep_top_k, keep_top_p))
SIZES = [1, 17, 1000, 1 << 14, (1 << 14) + 1, 50_000]


def by_sorting(x, keys, mass, wanted):
    order = np.argsort(-keys, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(mass[order], dtype=np.float64)[:-1]])
    out = np.full_like(x, -np.inf)
    kept = order[(before < wanted) & (keys[order] > -np.inf)]
    out[kept] = x[kept]
    return out


def keys_of(kind, n, rng):
    keys = rng.standard_normal(n).astype(np.float32) * 5
    if kind == "tied":
        keys = np.round(keys)
        keys[keys == 0] = rng.choice(np.float32([0.0, -0.0]), (keys == 0).sum())
    if kind == "some out":
        keys[rng.random(n) < 0.4] = -np.inf
        keys[rng.integers(n)] = 1e30
    if kind == "close":  # alike in all but their last bits
        keys = np.float32(1.0) + rng.integers(0, 1000, n).astype(np.float32) * np.float32(2.0**-23)
    return keys


@pytest.mark.parametrize("kind", ["plain", "tied", "some out", "close", "equal"])
@pytest.mark.parametrize("n", SIZES)
def test_counts_and_masses(numerics, n, kind):
    """Masses are whole numbers, whose sums are exact in any order."""
    rng = np.random.default_rng(n)
    keys = keys_of(kind, n, rng) if kind != "equal" else np.full(n, 2.5, np.float32)
    x = rng.standard_normal(n).astype(np.float32)
    for mass in (np.ones(n, np.float32), rng.integers(0, 4, n).astype(np.float32)):
        for wanted in {1, 2, 40, n // 3 + 1, n, 2 * n, 10 * n}:
            got = run(x, keys, mass, np.float32(wanted), numerics=numerics)
            np.testing.assert_array_equal(got, by_sorting(x, keys, mass, wanted))
            if mass.min() == mass.max() == 1.0:
                got = run_count(keys, np.float32(wanted), numerics=numerics)
                np.testing.assert_array_equal(got, by_sorting(keys, keys, mass, wanted))


@pytest.mark.parametrize("n", [100, (1 << 14) + 1, 60_000])
def test_shares_of_probabilities(numerics, n):
    """Sums of float32 may end one place sooner or later than those of float64, not further off."""
    rng = np.random.default_rng(n)
    for scale in (0.1, 1.0, 6.0):
        x = (rng.standard_normal(n) * scale).astype(np.float32)
        x[rng.random(n) < 0.2] = -np.inf
        p = np.exp(x - x.max())
        for share in (0.01, 0.5, 0.95, 0.999, 1.0):
            wanted = np.float32(share * p.sum(dtype=np.float64))
            expected = by_sorting(x, x, p, wanted) > -np.inf
            for found in (run(x, x, p, wanted, numerics=numerics), run_share(x, np.float32(share), numerics=numerics)):
                got = np.asarray(found) > -np.inf
                # The sum of 60,000 terms in float32 is off by a few units in its last place at most.
                most = 6e-6 * wanted + p[expected].min()
                assert abs(p[got].sum(dtype=np.float64) - p[expected].sum(dtype=np.float64)) <= most
                assert got.sum() > 0


def test_all_that_is_left_of_nothing(numerics):
    x, keys, mass = np.float32([[0.0], [-np.inf], [1.0]]).repeat(40, axis=1)
    out = run(x, keys, mass, np.float32(3.0), numerics=numerics)
    assert (np.asarray(out) == -np.inf).all()
