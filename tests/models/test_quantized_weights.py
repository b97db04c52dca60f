"""Models whose matrices stay the integers of their file."""

from dataclasses import replace

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oxjax
from benchmarks.random_model import PLAIN_TYPES, SHAPES
from benchmarks.random_model import write as write_random
from oxjax.assets import embedded_model
from oxjax.errors import ModelError
from oxjax.gguf import GGUFFile
from oxjax.gguf.planes import PLANE_FORMATS
from oxjax.kernels import native, quantized
from oxjax.kernels.dot import PART, dot
from oxjax.kernels.numerics import Numerics
from oxjax.kernels.quantized import QuantizedTensor
from oxjax.models.layers.linear import lookup, tied_logits
from oxjax.models.load import load_params
from oxjax.models.options import LoadOptions
from tests.helpers.oracle import require_llama_cpp
from tests.helpers.rewrite import rewrite

FILES = [
    f"llama-pure-{n}" for n in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
]
FILES += [f"llama-pure-{n}" for n in ("Q2_K", "Q3_K", "TQ1_0", "TQ2_0", "IQ1_M", "IQ3_S", "IQ3_XXS", "Q1_0")]
FILES += [f"llama-tt-{n}" for n in ("IQ1_S", "IQ2_S", "IQ2_XS", "IQ2_XXS", "mxfp4", "nvfp4")]
FILES += ["llama-mix-Q4_K_M"]


def is_quantized(leaf):
    return isinstance(leaf, QuantizedTensor)


def logits(path, **options):
    with oxjax.LLM(path, max_batch=1, max_context=64, **options) as llm:
        return llm.logits(list(range(3, 40)))[0]


@pytest.mark.parametrize("name", FILES)
def test_a_model_loads_without_loss(data, name):
    """Every matrix of the quantised model is the matrix of the dequantised one, to the bit."""
    with GGUFFile.open(data / "quants" / f"{name}.gguf") as file:
        _, packed = load_params(file, LoadOptions(weights="file"))
        _, plain = load_params(file, LoadOptions(weights="float32"))
        kept = any(t.ggml_type in PLANE_FORMATS for t in file.tensors.values())
    leaves = jax.tree.leaves(packed, is_leaf=is_quantized)
    assert any(map(is_quantized, leaves)) == kept
    for a, b in zip(leaves, jax.tree.leaves(plain), strict=True):
        dense = quantized.dequantize(a) if is_quantized(a) else a
        np.testing.assert_array_equal(dense.T if dense.shape != b.shape else dense, b)


@pytest.mark.parametrize("name", ["llama-pure-Q8_0", "llama-mix-Q4_K_M"])
def test_logits_are_those_of_the_dequantised_model_up_to_the_rounding_of_activations(data, name):
    path = data / "quants" / f"{name}.gguf"
    plain, packed = logits(path, weights="float32"), logits(path, weights="file")
    error = np.sqrt(np.mean((packed - plain) ** 2) / np.mean((plain - plain.mean(-1, keepdims=True)) ** 2))
    assert error < 0.05  # activations have 7 bits, through some layers
    assert (error > 1e-4) == (native.kernels() is not None)


def test_xla_logits_are_those_of_the_dequantised_model(data):
    path = data / "quants" / "llama-mix-Q4_K_M.gguf"
    plain = logits(path, weights="float32")
    packed = logits(path, weights="file", backend="xla")
    np.testing.assert_allclose(packed, plain, atol=1e-4 * np.abs(plain).max())


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_halves_stay_halves_and_lose_nothing(tmp_path, kind):
    """Files of 16-bit floats keep their size, and give the bits of float32 weights where there are kernels."""
    path = rewrite(embedded_model(), tmp_path / "half.gguf", gguf.GGMLQuantizationType[kind])
    with GGUFFile.open(path) as file:
        (_, kept), (_, plain) = (
            load_params(file, LoadOptions(weights="file")),
            load_params(file, LoadOptions(weights="float32")),
        )
    held = {str(a.dtype) for a in jax.tree.leaves(kept) if a.ndim > 1}
    assert held == {{"F16": "float16", "BF16": "bfloat16"}[kind]}
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b))
    if native.kernels() is not None:
        np.testing.assert_array_equal(logits(path), logits(path, weights="float32"))


@pytest.mark.parametrize("exact", [True, False])
def test_bfloat16_weights_under_float32_activations(backend, tmp_path, exact):
    how = {"backend": backend, "exact": exact}
    path = rewrite(embedded_model(), tmp_path / "bf16.gguf", gguf.GGMLQuantizationType.BF16)
    ours, theirs = (logits(p, weights=w, **how) for p, w in ((embedded_model(), "bfloat16"), (path, "float32")))
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * theirs.std())
    assert np.abs(ours - logits(embedded_model(), weights="float32", **how)).max() > 1e-3 * theirs.std()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("held", ["bfloat16", "quantised"])
def test_no_product_makes_its_matrix_whole_in_float32(numerics, exact, held):
    """Neither do tables, which are read transposed."""
    numerics = replace(numerics, exact=exact)
    d_in, d_out, form = 256, 3 * PART + 100, PLANE_FORMATS[oxjax.gguf.GGMLType.Q8_0]
    if held == "bfloat16":
        products = {
            (d_in, d_out): lambda x, w: dot(x, w, numerics=numerics)[0],
            (d_out, d_in): lambda x, w: dot(x, w, numerics=numerics, contract=1)[0],
        }
    else:

        def product(x, data):
            return quantized.quantized_matmul(x, QuantizedTensor(data, (d_in, d_out), form), numerics=numerics)[0]

        products = {(-(-d_out // 16), quantized.panel_bytes(d_in, form)): product}
    for shape, product in products.items():
        weight = jnp.zeros(shape, jnp.bfloat16 if held == "bfloat16" else jnp.uint8)
        compiled = jax.jit(product).lower(jnp.ones((4, d_in)), weight).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * d_in * d_out * 0.6


def test_a_tied_table_is_never_whole_in_float32():
    """Looking rows up and multiplying by all of them takes less memory than the table in float32."""
    d, n = 256, 8192
    form = PLANE_FORMATS[oxjax.gguf.GGMLType.Q8_0]
    data = jnp.zeros((n // 16, quantized.panel_bytes(d, form)), jnp.uint8)

    def compiled_memory(use):
        program = jax.jit(lambda data: use(QuantizedTensor(data, (d, n), form))).lower(data).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert compiled_memory(lambda table: lookup(table, jnp.arange(4), "float32")) < n * d // 4
    if native.kernels() is not None:
        assert (
            compiled_memory(lambda table: tied_logits(table, jnp.ones((4, d)), Numerics(backend="native"))) < n * d // 4
        )


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
@pytest.mark.parametrize("source", [embedded_model, lambda: "archs/falcon.gguf"], ids=["embedded", "falcon"])
def test_quantised_at_load_is_the_file_that_the_gguf_package_writes(data, tmp_path, source, kind):
    plain = rewrite(data / source(), tmp_path / "plain.gguf", gguf.GGMLQuantizationType.BF16)
    written = rewrite(plain, tmp_path / "written.gguf", gguf.GGMLQuantizationType[kind.upper()])
    with GGUFFile.open(plain) as file, GGUFFile.open(written) as other:
        (_, ours), (_, theirs) = (
            load_params(file, LoadOptions(weights=kind)),
            load_params(other, LoadOptions(weights="file")),
        )
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)  # the same matrices are quantised
    assert isinstance(ours.embedding, QuantizedTensor)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K"])
def test_parameters_take_the_memory_of_the_file(tmp_path, kind):
    if kind not in PLAIN_TYPES:
        require_llama_cpp()
    write_random(tmp_path / "random.gguf", SHAPES["tiny"], kind)
    with GGUFFile.open(tmp_path / "random.gguf") as file:
        _, params = load_params(file, LoadOptions(weights="file"))
        stored = sum(t.n_bytes for t in file.tensors.values())
    assert sum(a.nbytes for a in jax.tree.leaves(params)) <= 1.1 * stored


def test_scales_that_no_float16_is_are_dequantised(data, tmp_path):
    """A power of two beyond float16's in one block of MXFP4."""
    raw = bytearray((data / "quants" / "llama-tt-mxfp4.gguf").read_bytes())
    with GGUFFile.open(data / "quants" / "llama-tt-mxfp4.gguf") as file:
        (name, info), *_ = ((n, t) for n, t in file.tensors.items() if n.endswith("attn_q.weight"))
    raw[info.offset + 17] = 200
    (tmp_path / "large.gguf").write_bytes(raw)
    with GGUFFile.open(tmp_path / "large.gguf") as file:
        _, params = load_params(file, LoadOptions(weights="file"))
        expected = file.tensor(name)
    attention = params.layers[0].mixers[0]
    assert expected.max() >= 2.0**70
    np.testing.assert_array_equal(attention.q.weight.T, expected)
    assert isinstance(attention.k.weight, QuantizedTensor)


def test_rows_that_a_format_does_not_fit_stay_plain(data):
    with GGUFFile.open(data / "models" / "stories260K" / "stories260K.gguf") as file:
        _, params = load_params(file, LoadOptions(weights="q8_0"))
    mlp = params.layers[0].mlp
    assert isinstance(mlp.up.weight, QuantizedTensor)
    assert mlp.down.weight.shape == (172, 64)
    assert mlp.down.weight.dtype == jnp.float32


def test_float_activations_are_dequantised_math_in_the_memory_of_integers():
    how = {"weights": "file", "activations": "float32"}
    ours, theirs = logits(embedded_model(), **how), logits(embedded_model(), weights="float32")
    if native.kernels() is not None:
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * theirs.std())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": "int4"}, "activations 'int4' is not one of int8, float32"),
        ({"backend": "cuda"}, "backend 'cuda' is not one of auto, native, xla"),
        ({"dtype": "float16"}, "dtype 'float16' is not one of float32, bfloat16"),
        ({"weights": "q5_0"}, "weights 'q5_0' is not one of auto, file, float32, bfloat16, q8_0, q4_0"),
        ({"weights": "quantized"}, "weights 'quantized' is now called 'file'"),
        ({"quantize": "q8_0"}, "quantize='q8_0' is now weights='q8_0'"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ModelError, match=message):
        oxjax.load(embedded_model(), **options)


def test_weights_are_one_of_the_known_kinds(data):
    with pytest.raises(ModelError, match=r"'int3'.*auto, file, float32, bfloat16"):
        oxjax.load(data / "quants" / "llama-pure-Q8_0.gguf", weights="int3")
