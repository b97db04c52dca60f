"""Rotations against products of complex numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oxjax.kernels.dot import min_rows
from oxjax.kernels.rotate import rotate


def inputs(rows, heads, d, half, seed=0):
    rng = np.random.default_rng(seed)
    angle = rng.uniform(-100, 100, (rows, half))
    x = rng.standard_normal((rows, heads, d), np.float32)
    return x, np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


@pytest.mark.parametrize("adjacent", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("half", [1, 2, 15, 16, 17, 64])
def test_every_width(numerics, half, dtype, adjacent):
    for rows, heads, rest in ((1, 1, 0), (5, 3, 7)):
        x, cos, sin = inputs(rows, heads, 2 * half + rest, half)
        x = np.asarray(jnp.asarray(x, dtype), np.float32)
        pairs = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if adjacent else (slice(half), slice(half, 2 * half))
        turned = (x[..., pairs[0]] + 1j * x[..., pairs[1]]) * (cos + 1j * sin.astype(np.float64))[:, None]
        expected = x.copy()
        expected[..., pairs[0]], expected[..., pairs[1]] = turned.real, turned.imag
        got = rotate(jnp.asarray(x, dtype), jnp.asarray(cos), jnp.asarray(sin), adjacent=adjacent, numerics=numerics)
        assert got.dtype == dtype
        # Two products and a sum of numbers up to about 4 round by 2^-24 each; bfloat16 by 2^-9 in the end.
        np.testing.assert_allclose(np.asarray(got, np.float32), expected, atol=1e-6 if dtype == jnp.float32 else 0.02)


@pytest.mark.parametrize("adjacent", [True, False])
def test_bits_of_a_row_are_its_own(numerics, adjacent):
    x, cos, sin = inputs(200, 5, 40, 16)
    run = jax.jit(lambda *a: rotate(*a, adjacent=adjacent, numerics=numerics))
    whole = np.asarray(run(x, cos, sin))
    for rows in (min_rows(numerics), 17, 100):
        np.testing.assert_array_equal(run(x[-rows:], cos[-rows:], sin[-rows:]), whole[-rows:])
