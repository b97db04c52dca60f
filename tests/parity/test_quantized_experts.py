"""Mixtures whose experts stay the integers of their file."""

import subprocess
import sys

import jax
import numpy as np
import pytest

import oxjax
from oxjax.gguf import GGUFFile
from oxjax.kernels import native
from oxjax.kernels.quantized import QuantizedTensor, dequantize
from tests.helpers.cuts import same_bits_however_cut
from tests.helpers.oracle import LlamaCpp, require_llama_cpp
from tests.helpers.parity_loop import Loop
from tests.helpers.synth import RECIPES, Experts, write

KINDS = ["Q8_0", pytest.param("Q4_K_M", marks=pytest.mark.slow)]  # the latter has Q4_K and Q6_K
RECIPE = RECIPES["qwen3moe"].but(
    {"expert_feed_forward_length": 256}, d_model=256, d_ff=256, head_dim=32, experts=Experts(d_ff=256)
)
IDS, CHUNKS = np.random.default_rng(1).integers(3, 500, 64), [32, 32]
QUANTIZE = "import sys; from benchmarks.random_model import quantize; quantize(*sys.argv[1:])"


@pytest.fixture(scope="module")
def file_of(data, tmp_path_factory):
    """A random mixture as llama.cpp's quantiser writes it."""
    require_llama_cpp()
    folder, made = tmp_path_factory.mktemp("experts"), {}

    def get(kind):
        if kind not in made:
            source, made[kind] = folder / "f32.gguf", folder / f"{kind}.gguf"
            write(source, RECIPE, data / "archs" / "llama.gguf")
            subprocess.run([sys.executable, "-c", QUANTIZE, source, made[kind], kind], check=True, capture_output=True)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_experts_load_without_loss_and_take_the_memory_of_the_file(file_of, kind):
    packed, plain = (oxjax.load(file_of(kind), weights=w).params for w in ("file", "float32"))
    for ours, theirs in zip(packed.layers, plain.layers, strict=True):
        for name in ("gate", "up", "down"):
            experts, dense = getattr(ours.mlp, name).weight, getattr(theirs.mlp, name).weight
            assert isinstance(experts, QuantizedTensor)
            for e, matrix in enumerate(dense):
                own = QuantizedTensor(experts.data[e], experts.shape, experts.format)
                np.testing.assert_array_equal(dequantize(own), matrix)
    with GGUFFile.open(file_of(kind)) as file:
        in_file = sum(t.n_bytes for t in file.tensors.values())
    assert sum(a.nbytes for a in jax.tree.leaves(packed)) <= 1.1 * in_file


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_dequantised_experts_up_to_the_rounding_of_activations(file_of, kind, report):
    plain, packed = (Loop(oxjax.load(file_of(kind), weights=w)).logits(IDS, CHUNKS) for w in ("float32", "file"))
    with LlamaCpp(file_of(kind), vocab_only=False) as oracle:
        theirs = oracle.logits(IDS.tolist())

    def error(got, expected):
        """Of each row, as a share of the standard deviation; routers may tip in a few rows."""
        return np.median(np.sqrt(np.mean((got - expected) ** 2, axis=1)) / expected.std())

    report(f"experts in {kind}: {error(packed, plain):.1e} from dequantised ones, llama.cpp {error(theirs, plain):.1e}")
    assert error(packed, plain) < 0.03
    assert error(packed, theirs) < 0.03
    assert (error(packed, plain) > 1e-4) == (native.kernels() is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_float_activations_give_the_bits_of_dequantised_experts(file_of, kind):
    options = ({"weights": "float32"}, {"weights": "file", "activations": "float32"})
    plain, packed = (Loop(oxjax.load(file_of(kind), **more)).logits(IDS, CHUNKS) for more in options)
    np.testing.assert_array_equal(packed, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_chunks(file_of, kind):
    same_bits_however_cut(oxjax.load(file_of(kind), weights="file"))
