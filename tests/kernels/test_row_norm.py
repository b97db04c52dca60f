"""Norms of rows against their formulas in float64."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oxjax.kernels.dot import min_rows
from oxjax.kernels.row_norm import row_norm

WIDTHS = [1, 15, 16, 65, 128, 1000]


def textbook(x, weight, bias, *, eps, centred):
    x = x.astype(np.float64)
    x = x - x.mean(-1, keepdims=True) if centred else x
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    if weight is not None:
        y *= np.tile(weight, (len(x) // len(weight), 1))
    return y if bias is None else y + bias


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("weights", [0, 1, 3])
def test_every_width(numerics, backend, weights, centred, exact):
    numerics = replace(numerics, exact=exact)
    rng = np.random.default_rng(0)
    for d in WIDTHS if backend == "native" else (1, 17, 64):
        x = rng.standard_normal((12, d), np.float32) * 3 + 1
        weight = rng.standard_normal((weights, d), np.float32) if weights else None
        bias = rng.standard_normal(d, np.float32) if weights == 1 else None
        got = row_norm(
            jnp.asarray(x),
            *_on_device(weight, bias),
            eps=1e-5,
            centred=centred,
            numerics=replace(numerics, exact=exact),
        )
        # A few roundings of numbers up to about 10; a width of 1 divides what is left of a difference by sqrt(eps).
        atol = 1e-5 if d > 1 or not centred else 1e-3
        np.testing.assert_allclose(got, textbook(x, weight, bias, eps=1e-5, centred=centred), rtol=0, atol=atol)


@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
def test_bits_of_a_row_are_its_own(numerics, backend, centred):
    """In programs of as many rows as exact mode has at least, or more."""
    rng = np.random.default_rng(1)
    norm = jax.jit(partial(row_norm, eps=1e-6, centred=centred, numerics=numerics))
    least = min_rows(numerics)
    for d in WIDTHS if backend == "native" else (17, 64):
        x = rng.standard_normal((2 * 8192 // d + 40, d), np.float32)
        x[3] = np.nan
        weight = jnp.asarray(rng.standard_normal((1, d), np.float32))
        whole = np.asarray(norm(x, weight, None))
        for rows in (least, least + 1, 2 * least, 17):
            np.testing.assert_array_equal(norm(x[-rows:], weight, None), whole[-rows:])
        assert np.isnan(whole[3]).all() and np.isfinite(np.delete(whole, 3, axis=0)).all()


def test_a_row_of_zeros_is_no_division_by_zero(numerics):
    x = jnp.zeros((2, 40))
    for centred in (True, False):
        np.testing.assert_array_equal(row_norm(x, None, None, eps=1e-6, centred=centred, numerics=numerics), 0.0)


def _on_device(*arrays):
    return [None if a is None else jnp.asarray(a) for a in arrays]
