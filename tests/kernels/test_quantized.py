"""Weights as integers: lossless packing, and products whose bits depend on a row and the weights alone."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oxjax.errors import BackendUnavailableError
from oxjax.gguf import block_layout
from oxjax.gguf.ggml_types import GGMLType
from oxjax.gguf.planes import PLANE_FORMATS, planes
from oxjax.gguf.quants import dequantize as dequantize_file
from oxjax.kernels import native
from oxjax.kernels.dot import dot
from oxjax.kernels.numerics import Numerics
from oxjax.kernels.quantized import QuantizedTensor, columns, dequantize, pack, panel_bytes, quantized_matmul

CPU = Path(native.__file__).parent / "cpu"
# Where blocks have their float16 scales and minima, or, in IQ1_M, their upper quarter; elsewhere they begin with them.
HALVES = {
    GGMLType.Q6_K: (208,),
    GGMLType.Q2_K: (80, 82),
    GGMLType.Q3_K: (108,),
    GGMLType.TQ1_0: (52,),
    GGMLType.TQ2_0: (64,),
    GGMLType.IQ1_M: (54,),
    GGMLType.MXFP4: (),
}
ROWS = [1, 7, 8, 17, 100]
for_all_formats = pytest.mark.parametrize("ggml_type", PLANE_FORMATS, ids=lambda t: t.name)
NATIVE = Numerics(backend="native")
needs_kernels = pytest.mark.skipif(native.kernels() is None, reason=native.describe())


def quantized(ggml_type, n, k, seed=0):
    """Random blocks with finite scales: the tensor, and the file's bytes dequantised `[n, k]`."""
    per_block, block_bytes = block_layout(ggml_type)
    raw = np.random.default_rng(seed).integers(0, 256, n * k // per_block * block_bytes, dtype=np.uint8)
    blocks = raw.reshape(-1, block_bytes)
    for at in HALVES.get(ggml_type, (0, 2) if PLANE_FORMATS[ggml_type].minima else (0,)):
        # An exponent below the largest, and above those whose eighth is subnormal.
        blocks[:, at + 1] = blocks[:, at + 1] & 0b10101011 | 0b00100000
    if ggml_type == GGMLType.MXFP4:
        blocks[:, 0] = 104 + blocks[:, 0] % 40
    form = PLANE_FORMATS[ggml_type]
    out = np.empty((-(-n // 16), panel_bytes(k, form)), np.uint8)
    pack(planes(raw, ggml_type, (n, k)), form, out)
    return QuantizedTensor(jnp.asarray(out), (k, n), form), dequantize_file(raw, ggml_type, (n, k))


@for_all_formats
@pytest.mark.parametrize(("n", "k"), [(16, 256), (1, 512), (7, 768), (40, 256)])
def test_packing_loses_nothing(ggml_type, n, k):
    w, expected = quantized(ggml_type, n, k)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(np.asarray(dequantize(w)).T.view(np.uint32), expected.view(np.uint32))
    ids = np.random.default_rng(1).integers(0, n, 9)
    np.testing.assert_array_equal(
        np.asarray(columns(w, jnp.asarray(ids))).view(np.uint32), expected[ids].view(np.uint32)
    )


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
def test_memory_is_that_of_the_file(name):
    per_block, block_bytes = block_layout(GGMLType[name])
    file_bytes = 1024 // per_block * block_bytes * 16
    assert panel_bytes(1024, PLANE_FORMATS[GGMLType[name]]) <= 1.1 * file_bytes


def as_int8(x):
    """What the kernel makes of activations, in float64."""
    groups = x.reshape(*x.shape[:-1], -1, 32)
    largest = np.abs(groups).max(-1, keepdims=True)
    codes = np.rint(groups * (np.float32(127) / largest))
    return (codes.astype(np.float64) * (largest / np.float32(127))).reshape(x.shape)


@needs_kernels
@for_all_formats
@pytest.mark.parametrize(("n", "k"), [(1, 256), (15, 768), (72, 512), (300, 1024)])
def test_kernel_is_the_product_of_what_it_quantised(ggml_type, n, k):
    w, weights = quantized(ggml_type, n, k)
    x = np.random.default_rng(2).standard_normal((17, k), np.float32)
    x[3, 32:64] = 0.0
    with np.errstate(invalid="ignore", divide="ignore"):
        rounded = np.nan_to_num(as_int8(x))
    got = np.asarray(quantized_matmul(jnp.asarray(x), w, numerics=NATIVE)[0])
    # k / 16 float32 additions, each of a term rounded up to four times.
    bound = (k / 16 + 4) * 2.0**-24 * (np.abs(rounded) @ np.abs(weights.T.astype(np.float64)) + 1e-30)
    if PLANE_FORMATS[ggml_type].minima:  # scale and minimum cancel in the weights, not in the sums
        bound *= 4
    assert (np.abs(got - rounded @ weights.T.astype(np.float64)) <= bound).all()
    exact = x.astype(np.float64) @ weights.T.astype(np.float64)
    assert np.sqrt(np.mean((got - exact) ** 2) / np.mean(exact**2)) < 0.02  # 7 bits of activations


@needs_kernels
@for_all_formats
@pytest.mark.parametrize(("n", "k"), [(1, 256), (15, 768), (300, 1024)])
def test_float_activations_have_the_bits_of_dequantised_weights(ggml_type, n, k):
    w, weights = quantized(ggml_type, n, k)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((17, k), np.float32))
    expected = dot(x, jnp.asarray(weights.T), numerics=NATIVE)[0]
    for rows in (1, 2, 8, 17):
        got = quantized_matmul(x[:rows], w, numerics=replace(NATIVE, activations="float32"))[0]
        np.testing.assert_array_equal(got, expected[:rows])
    assert (got != quantized_matmul(x, w, numerics=NATIVE)[0]).any()


@needs_kernels
@for_all_formats
def test_bits_of_a_row_do_not_depend_on_the_number_of_rows(ggml_type):
    w, _ = quantized(ggml_type, 300, 1024)
    other, _ = quantized(GGMLType.Q6_K, 21, 1024)
    x = jnp.asarray(np.random.default_rng(3).standard_normal((max(ROWS), 1024), np.float32))
    run = jax.jit(lambda x, *w: quantized_matmul(x, *w, numerics=NATIVE))
    whole = np.asarray(run(x, w)[0])
    for rows in ROWS:
        for start in {0, 3, x.shape[0] - rows} if rows <= x.shape[0] - 3 else {0}:
            part = run(x[start : start + rows], other, w)[1]
            np.testing.assert_array_equal(part, whole[start : start + rows])


@needs_kernels
def test_sizes_that_do_not_fit_are_refused():
    w, _ = quantized(GGMLType.Q4_K, 16, 256)
    run = jax.jit(lambda x, w: quantized_matmul(x, w, numerics=NATIVE))
    for wrong in (QuantizedTensor(w.data, (256, 17), w.format), QuantizedTensor(w.data[:, 64:], w.shape, w.format)):
        with pytest.raises(Exception, match=r"expected a matrix of \d+ bytes; found x \[2, 256\], matrix"):
            jax.block_until_ready(run(jnp.ones((2, 256)), wrong))
    with pytest.raises(Exception, match=r"4 bits, .*, 128 inputs"):
        jax.block_until_ready(run(jnp.ones((2, 128)), w))


@needs_kernels
def test_what_is_not_a_number_stays_in_its_row():
    w, _ = quantized(GGMLType.Q8_0, 40, 64)
    x = np.ones((4, 64), np.float32)
    x[1, 5], x[2, 40], x[3] = np.nan, np.inf, 1e-38
    got = np.asarray(quantized_matmul(jnp.asarray(x), w, numerics=NATIVE)[0])
    assert np.isfinite(got[0]).all()
    assert np.isnan(got[1:3]).all()
    assert (got[3] == 0).all()


_RUN = """
import os, sys
os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: int(sys.argv[1])]))
import hashlib, jax.numpy as jnp, numpy as np
from tests.kernels.test_quantized import NATIVE, GGMLType, quantized, quantized_matmul
w = [quantized(t, 700, 1024)[0] for t in (GGMLType.Q4_0, GGMLType.Q5_K)]
x = jnp.asarray(np.random.default_rng(0).standard_normal((37, 1024), np.float32))
print(hashlib.sha256(b"".join(np.asarray(y).tobytes() for y in quantized_matmul(x, *w, numerics=NATIVE))).hexdigest())
"""


@needs_kernels
def test_bits_do_not_depend_on_threads():
    command = [sys.executable, "-c", _RUN]
    paths = {"PYTHONPATH": str(CPU.parents[2])}
    runs = [
        subprocess.run([*command, n], capture_output=True, text=True, check=True, env={**os.environ, **paths})
        for n in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout != ""


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_where_there_is_a_compiler_there_are_kernels():
    assert native.kernels(), native.describe()


def test_without_a_compiler_xla_does_the_work(numerics, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native, "_cache_folder", lambda: tmp_path)
    native._load.cache_clear()
    try:
        assert native.kernels() is None
        assert native.kernels() is None
        assert "no C++ compiler" in native.describe()
        with pytest.raises(BackendUnavailableError, match=r'backend "native" .* no C\+\+ compiler'):
            native.resolve_backend("native")
        assert len([r for r in caplog.records if "no native kernels" in r.message]) == 1
        w, weights = quantized(GGMLType.Q4_K, 40, 512)
        x = np.random.default_rng(0).standard_normal((3, 512), np.float32)
        numerics = Numerics(backend=native.resolve_backend("auto"))
        got = quantized_matmul(jnp.asarray(x), w, numerics=numerics)[0]
        np.testing.assert_allclose(got, x @ weights.T, atol=1e-4 * np.abs(x @ weights.T).max())
    finally:
        monkeypatch.undo()
        native._load.cache_clear()
