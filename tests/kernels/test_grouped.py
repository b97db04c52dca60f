"""Products by expert against a float64 loop over pairs, and their bits against those of a row by itself."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oxjax.gguf.ggml_types import GGMLType
from oxjax.kernels.dot import dot, min_rows
from oxjax.kernels.grouped import grouped_matmul
from oxjax.kernels.numerics import Numerics
from oxjax.kernels.quantized import QuantizedTensor, dequantize, quantized_matmul
from tests.kernels.test_quantized import NATIVE, for_all_formats, needs_kernels, quantized

E, N_USED = 9, 3
SIZES = [(1, 1, 1), (50, 129, 67), (70, 17, 530)]  # rows, d_in, d_out


def table(rng, rows):
    """Different experts for each row; nobody chooses the last one, and some rows have none."""
    chosen = np.argsort(rng.random((rows, E - 1)), axis=1)[:, :N_USED].astype(np.int32)
    chosen[rows // 3 : rows // 2] = E
    return chosen


def one_by_one(x, chosen, weights):
    """In float64, `weights` of one expert each."""
    x = np.broadcast_to(np.asarray(x, np.float64), (*chosen.shape, x.shape[2]))
    out = np.zeros((*chosen.shape, np.shape(weights[0])[1]))
    for place in np.argwhere(chosen < E):
        out[tuple(place)] = x[tuple(place)] @ np.asarray(weights[chosen[tuple(place)]], np.float64)
    return out


def packed(ggml_type, d_in, d_out, seed=0):
    """Experts of random blocks: all of them, each by itself, and in float64."""
    made = [quantized(ggml_type, d_out, d_in, seed + e) for e in range(E)]
    apart = [w for w, _ in made]
    together = QuantizedTensor(jnp.stack([w.data for w in apart]), apart[0].shape, apart[0].format)
    return together, apart, [w.T for _, w in made]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("n", [1, N_USED])
def test_float_products(backend, numerics, n, dtype):
    rng = np.random.default_rng(0)
    for rows, d_in, d_out in SIZES if backend == "native" else SIZES[1:2]:
        chosen, x = table(rng, rows), jnp.asarray(rng.standard_normal((rows, n, d_in)), dtype)
        weights = [jnp.asarray(rng.standard_normal((E, d_in, d)), dtype).at[-1].set(jnp.nan) for d in (d_out, 5)]
        for exact in (True, False):
            got = grouped_matmul(x, jnp.asarray(chosen), *weights, numerics=replace(numerics, exact=exact))
            for y, w in zip(got, weights, strict=True):
                # Float32 sums of up to 300 products of about 1.
                np.testing.assert_allclose(y, one_by_one(x, chosen, w), rtol=0, atol=2e-4)
        if backend == "native":  # the same as of a plain product
            y = np.asarray(grouped_matmul(x, jnp.asarray(chosen), *weights, numerics=numerics)[0])
            for r, j in np.argwhere(chosen < E)[::11]:
                alone = dot(x[r, j % n][None], weights[0][chosen[r, j]], numerics=numerics)[0][0]
                np.testing.assert_array_equal(y[r, j], alone)


@needs_kernels
@for_all_formats
@pytest.mark.parametrize(("rows", "d_in", "d_out", "n"), [(1, 256, 16, 1), (13, 512, 40, N_USED), (70, 256, 100, 1)])
def test_quantized_products_have_the_bits_of_plain_ones(ggml_type, rows, d_in, d_out, n):
    rng = np.random.default_rng(1)
    chosen, x = table(rng, rows), jnp.asarray(rng.standard_normal((rows, n, d_in), np.float32))
    other, _, _ = packed(GGMLType.Q6_K, d_in, 21)
    together, apart, _ = packed(ggml_type, d_in, d_out)
    got = np.asarray(grouped_matmul(x, jnp.asarray(chosen), other, together, numerics=NATIVE)[1])
    for e in range(E):
        pairs = np.argwhere(chosen == e)
        if len(pairs):
            alone = quantized_matmul(x[pairs[:, 0], pairs[:, 1] % n], apart[e], numerics=NATIVE)[0]
            np.testing.assert_array_equal(got[pairs[:, 0], pairs[:, 1]], alone)
    np.testing.assert_array_equal(got[chosen == E], 0.0)


@needs_kernels
@for_all_formats
def test_float_activations_over_quantized_experts_have_the_bits_of_dequantised_ones(ggml_type):
    rng = np.random.default_rng(4)
    for rows, d_in, d_out in ((1, 256, 16), (70, 512, 300)):
        chosen, x = jnp.asarray(table(rng, rows)), jnp.asarray(rng.standard_normal((rows, 1, d_in), np.float32))
        together, apart, _ = packed(ggml_type, d_in, d_out)
        got = grouped_matmul(x, chosen, together, numerics=replace(NATIVE, activations="float32"))[0]
        dense = jnp.stack([dequantize(w) for w in apart])
        np.testing.assert_array_equal(got, grouped_matmul(x, chosen, dense, numerics=NATIVE)[0])


@pytest.mark.parametrize("ggml_type", [GGMLType.Q8_0, GGMLType.Q4_K])
def test_xla_quantized_products_are_those_of_the_dequantised_matrices(ggml_type):
    rng = np.random.default_rng(2)
    chosen, x = table(rng, 40), rng.standard_normal((40, 1, 256), np.float32)
    together, _, plain = packed(ggml_type, 256, 24)
    expected = one_by_one(x, chosen, plain)
    for numerics in (Numerics(), Numerics(exact=False)):
        got = grouped_matmul(jnp.asarray(x), jnp.asarray(chosen), together, numerics=numerics)[0]
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["float", "quantized"])
def test_bits_of_a_row_do_not_depend_on_the_number_of_rows(numerics, kind):
    rng = np.random.default_rng(3)
    chosen, x = jnp.asarray(table(rng, 90)), jnp.asarray(rng.standard_normal((90, 1, 256), np.float32))
    w = packed(GGMLType.Q5_K, 256, 70)[0]
    w = w if kind == "quantized" else jnp.asarray(rng.standard_normal((E, 256, 70), np.float32))
    run = jax.jit(lambda x, chosen: grouped_matmul(x, chosen, w, numerics=numerics)[0])
    whole = np.asarray(run(x, chosen))
    for start, rows in ((0, min_rows(numerics)), (3, 17), (1, 16), (20, 64)):
        part = slice(start, start + rows)
        np.testing.assert_array_equal(run(x[part], chosen[part]), whole[part])


@needs_kernels
def test_what_does_not_fit_is_refused():
    x, w = jnp.ones((2, 1, 256)), packed(GGMLType.Q4_K, 256, 16)[0]
    run = jax.jit(lambda x, chosen, w: grouped_matmul(x, chosen, w, numerics=NATIVE))
    for bad in (-1, E + 1):
        with pytest.raises(Exception, match=r"expected experts from 0 to \d+; found"):
            jax.block_until_ready(run(x, jnp.full((2, 3), bad, jnp.int32), w))
    with pytest.raises(Exception, match=r"expected matrices of 2 panels of \d+ bytes; found x"):
        jax.block_until_ready(run(x, jnp.zeros((2, 3), jnp.int32), QuantizedTensor(w.data, (256, 17), w.format)))
