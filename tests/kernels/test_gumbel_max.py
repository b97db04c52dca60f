"""Draws: the bits behind the noise, its distribution, and that a row's draw is its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from oxjax.kernels.gumbel_max import gumbel_max, gumbel_noise

run = jax.jit(gumbel_max, static_argnames="numerics")


def keys(n, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, (n, 2), dtype=np.uint32)


def numpy_noise(key, n):
    """The definition in float64, from the cipher written out."""
    words = np.array([[0] * n, range(n)], np.uint64)
    schedule = [int(key[0]), int(key[1]), 0x1BD11BDA ^ int(key[0]) ^ int(key[1])]
    m = np.uint64(0xFFFFFFFF)
    words = (words + np.array(schedule[:2], np.uint64)[:, None]) & m
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            words[0] = (words[0] + words[1]) & m
            words[1] = ((words[1] << np.uint64(turn) | words[1] >> np.uint64(32 - turn)) & m) ^ words[0]
        words[0] = (words[0] + np.uint64(schedule[(group + 1) % 3])) & m
        words[1] = (words[1] + np.uint64(schedule[(group + 2) % 3] + group + 1)) & m
    v = words[0] / 2.0**32 + (words[1] + 0.5) / 2.0**64
    return words, -np.log(-np.log1p(-np.minimum(v, 1 - 2.0**-24)))


def test_the_cipher_is_threefry():
    """A known answer of its authors' (Random123, kat_vectors), and JAX's."""
    assert [hex(w) for w in numpy_noise((0, 0), 1)[0][:, 0]] == ["0x6b200159", "0x99ba4efe"]
    for key in keys(3):
        theirs = threefry_2x32(
            jnp.asarray(key), jnp.stack([jnp.zeros(999, jnp.uint32), jnp.arange(999, dtype=jnp.uint32)])
        )
        np.testing.assert_array_equal(numpy_noise(key, 999)[0], theirs)


def test_the_noise_is_what_its_definition_says():
    for key in keys(3):
        expected = numpy_noise(key, 50_000)[1]
        # Two logarithms in float32; where e^-noise is large, 1 - v is small, and v is a multiple of 2^-24 there.
        inner = np.exp(-expected)
        tolerance = 2e-6 * (1 + np.abs(expected)) + 2.0**-24 * np.exp(inner) / inner * (inner > 0.5)
        assert (np.abs(np.asarray(gumbel_noise(jnp.asarray(key), 50_000)) - expected) <= tolerance).all()


@pytest.mark.parametrize("d", [1, 15, 17, 8192, 8193, 20000])
def test_every_width(numerics, d):
    """The choice is the largest sum, but for sums that float32 cannot tell apart; every column can win."""
    rng = np.random.default_rng(d)
    logits = rng.standard_normal((40, d), np.float32) * rng.choice([0.0, 1.0, 6.0], (40, 1)).astype(np.float32)
    logits[rng.random((40, d)) < 0.3] = -np.inf
    logits[:, rng.integers(d)] = 0.0
    k = keys(40, d)
    chosen = np.asarray(run(jnp.asarray(logits), jnp.asarray(k), numerics=numerics))
    for row, key, at in zip(logits, k, chosen, strict=True):
        sums = row + numpy_noise(key, d)[1]
        assert sums[at] >= sums.max() - 1e-5


def test_each_column_is_drawn_as_often_as_it_is_likely(numerics):
    """Pearson's chi-square of 200,000 draws with 39 degrees of freedom: 90.3 is passed in 5e-6 of all seeds."""
    p = np.random.default_rng(1).dirichlet(np.ones(40))
    n = 200_000
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (n, 40))
    counts = np.bincount(run(logits, jnp.asarray(keys(n, 5)), numerics=numerics), minlength=40)
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 90.3


def test_a_draw_depends_on_its_key_and_row_alone(numerics):
    logits, k = np.random.default_rng(2).standard_normal((50, 9000), np.float32), keys(50, 3)
    whole = np.asarray(run(logits, k, numerics=numerics))
    for part in (slice(0, 1), slice(7, 24), slice(49, 50)):
        np.testing.assert_array_equal(run(logits[part], k[part], numerics=numerics), whole[part])
    wider = np.concatenate([logits, np.full((50, 777), -np.inf, np.float32)], axis=1)
    np.testing.assert_array_equal(run(wider, k, numerics=numerics), whole)
    assert len(np.unique(whole)) > 40


def test_what_is_out_is_never_drawn(numerics):
    logits = np.full((300, 20_000), -np.inf, np.float32)
    logits[:, [3, 9000, 19_999]] = [[0.0, 1.0, 0.5]]
    assert set(np.asarray(run(logits, keys(300, 4), numerics=numerics)).tolist()) == {3, 9000, 19_999}
