from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oxjax.kernels.dot import ROW_TILE, dot, dot_heads, min_rows, row_sum, softmax

HALF = pytest.param(jnp.float16, marks=pytest.mark.slow)  # as bfloat16
ROWS = [1, 2, ROW_TILE - 1, ROW_TILE, ROW_TILE + 1, 2 * ROW_TILE, 5 * ROW_TILE + 3]


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in ((max(ROWS), 172), (172, 64), (172, 33))]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("rows", ROWS)
def test_dot_is_the_product(numerics, arrays, rows, exact):
    x, *weights = arrays
    for got, w in zip(dot(x[:rows], *weights, numerics=replace(numerics, exact=exact)), weights, strict=True):
        # Float32 sums of 172 products of about 1: a few times 172 * 2^-24 * |sum of magnitudes|.
        np.testing.assert_allclose(got, np.asarray(x[:rows], np.float64) @ np.asarray(w), rtol=0, atol=1e-4)
    transposed = dot(x[:rows], weights[0].T, numerics=replace(numerics, exact=exact), contract=1)[0]
    np.testing.assert_allclose(transposed, x[:rows] @ weights[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("op", ["dot", "dot_transposed", "row_sum"])
def test_bits_of_a_row_do_not_depend_on_the_number_of_rows(numerics, arrays, op):
    x, w, _ = arrays
    run = {
        "dot": lambda x: dot(x, w, numerics=numerics)[0],
        "dot_transposed": lambda x: dot(x, w.T, numerics=numerics, contract=1)[0],
        "row_sum": lambda x: row_sum(x, numerics=numerics),
    }[op]
    whole = np.asarray(jax.jit(run)(x))
    for rows in ROWS:
        for start in {0, 7, x.shape[0] - rows}:
            part = x[start : start + rows]
            np.testing.assert_array_equal(jax.jit(run)(part), whole[start : start + rows])


@pytest.mark.parametrize("width", [8, 60, 512])
def test_bits_do_not_depend_on_what_xla_fuses(numerics, width):
    """From 4,096 numbers on XLA:CPU gives a maximum and what follows it to a library with an exponential of its own."""
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1200, width), np.float32))
    run = jax.jit(lambda x: softmax(x, numerics=numerics))
    whole = np.asarray(run(x))
    for rows in (1, 16, 64, 300):
        np.testing.assert_array_equal(run(x[:rows]), whole[:rows])


def test_softmax_matches_jax(numerics, arrays):
    np.testing.assert_allclose(softmax(arrays[0], numerics=numerics), jax.nn.softmax(arrays[0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, HALF], ids=lambda d: d.__name__)
@pytest.mark.parametrize("contract", [0, 1])
def test_every_size_and_type(numerics, backend, dtype, contract):
    """Around the vectors, tiles and packed parts of the native kernel; rows past the ones it reads in place."""
    rng = np.random.default_rng(1)
    sizes = [(d_in, d_out) for d_in in (1, 7, 9, 17, 128, 129, 300) for d_out in (1, 15, 16, 17, 64, 65, 256, 257, 600)]
    step = 20 if backend == "xla" else 4  # every fourth one has each width and height too
    for d_in, d_out in sizes[::step]:
        w = jnp.asarray(rng.standard_normal((d_in, d_out) if contract == 0 else (d_out, d_in)), dtype)
        x = jnp.asarray(rng.standard_normal((11, d_in)), dtype)
        expected = np.asarray(x, np.float64) @ np.asarray(w if contract == 0 else w.T, np.float64)
        whole = np.asarray(dot(x, w, numerics=numerics, contract=contract)[0])
        # As above, of up to 300.
        np.testing.assert_allclose(whole, expected, rtol=0, atol=2e-4)
        rows = int(rng.integers(1, 11))
        np.testing.assert_array_equal(dot(x[-rows:], w, numerics=numerics, contract=contract)[0], whole[-rows:])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize(("heads", "d_in", "d_out"), [(1, 1, 1), (4, 40, 24), (3, 129, 67), (2, 17, 530), (60, 8, 16)])
def test_products_by_head(numerics, heads, d_in, d_out, dtype):
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((3 * ROW_TILE + 5, heads, d_in)), dtype)
    w = jnp.asarray(rng.standard_normal((heads, d_in, d_out)), dtype)
    expected = np.einsum("thi,hio->tho", np.asarray(x, np.float64), np.asarray(w, np.float64))
    whole = np.asarray(dot_heads(x, w, numerics=numerics))
    # As above, of up to 129.
    for got in (whole, dot_heads(x, w, numerics=replace(numerics, exact=False))):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    for start, rows in ((0, 1), (9, 1), (3, 8), (4, 9), (3, 15), (1, 16), (8, 17)):
        part = slice(start, start + rows)
        np.testing.assert_array_equal(dot_heads(x[part], w, numerics=numerics), whole[part])


def test_what_is_not_finite_stays_in_its_row(numerics):
    x = jnp.asarray(np.random.default_rng(2).standard_normal((5, 40), np.float32))
    w = jnp.ones((40, 70))
    broken = dot(x.at[2, 3].set(jnp.nan).at[3, 0].set(jnp.inf), w, numerics=numerics)[0]
    expected = dot(x, w, numerics=numerics)[0]
    np.testing.assert_array_equal(broken[np.array([0, 1, 4])], expected[np.array([0, 1, 4])])
    assert jnp.isnan(broken[2]).all() and jnp.isposinf(broken[3]).all()


@pytest.mark.parametrize("width", [1, 3, 5, 6, 7, 8, 13])
def test_what_follows_a_narrow_product_keeps_its_bits(numerics, width):
    """Programs of fewer rows than `FEW_ROWS` fuse the exponential's last product with the sum in some widths."""
    rng = np.random.default_rng(3)
    x, w = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in ((512, 64), (64, width)))
    run = jax.jit(lambda x: jax.nn.sigmoid(dot(x, 0.1 * w, numerics=numerics)[0]))
    whole, rows = np.asarray(run(x)), min_rows(numerics)
    for start in range(0, 512, rows):
        np.testing.assert_array_equal(run(x[start : start + rows]), whole[start : start + rows])
