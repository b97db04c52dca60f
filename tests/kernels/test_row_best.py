"""The largest of each row and the logarithm of the sum of exponentials, against NumPy in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oxjax.kernels.dot import min_rows
from oxjax.kernels.row_best import row_best

WIDTHS = [1, 2, 15, 16, 17, 500, 4096, 8191, 8192, 8193, 20000]
run = jax.jit(row_best, static_argnames="numerics")


def logits(rows, d, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, d), np.float32) * 8


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("d", WIDTHS)
def test_every_width(numerics, d, exact):
    x = logits(7, d)
    x[5:] = x[4]
    best, largest, log_sum = row_best(jnp.asarray(x), numerics=replace(numerics, exact=exact))
    np.testing.assert_array_equal(best, x.argmax(-1))
    np.testing.assert_array_equal(largest, x.max(-1))
    # Some hundred sums of positive terms follow one another in a lane; each rounds by 2^-24.
    expected = np.log(np.exp(x.astype(np.float64) - x.max(-1, keepdims=True)).sum(-1))
    np.testing.assert_allclose(log_sum, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("d", [500, 8193])
def test_bits_of_a_row_are_its_own(numerics, d):
    x = logits(1200 if d == 500 else 70, d)
    whole = [np.asarray(a) for a in run(x, numerics=numerics)]
    for rows in (min_rows(numerics), 17, 64):
        for got, expected in zip(run(x[-rows:], numerics=numerics), whole, strict=True):
            np.testing.assert_array_equal(got, expected[-rows:])


@pytest.mark.parametrize("d", [40, 8200])
def test_the_first_of_equals_wins(numerics, d):
    x = np.zeros((4, d), np.float32)
    x[1, [d - 1, 3, 20]] = 2.0
    x[2, d - 1] = 1.0
    x[3] = -5.0
    best, largest, log_sum = run(x, numerics=numerics)
    np.testing.assert_array_equal(best, [0, 3, d - 1, 0])
    np.testing.assert_array_equal(largest, [0.0, 2.0, 1.0, -5.0])
    np.testing.assert_allclose(log_sum, np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1)), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 17, 8199])
def test_what_is_not_finite_shows(numerics, bad, place):
    x = logits(5, 8200)
    x[2, place] = bad
    assert np.isfinite(np.asarray(run(x, numerics=numerics)[2])).tolist() == [True, True, False, True, True]
