"""Every block format decodes to the bits of an independent decoder."""

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES

from oxjax.gguf import GGMLType, GGUFFile, block_layout, dequantize
from oxjax.gguf.ggml_types import ACTIVATION_ONLY
from oxjax.gguf.quants import has_big_endian_form, to_little_endian
from tests.helpers.data import data_files

INTEGERS = {
    GGMLType.I8: np.int8,
    GGMLType.I16: np.int16,
    GGMLType.I32: np.int32,
    GGMLType.I64: np.int64,
    GGMLType.F64: np.float64,
}
IN_GGUF_PY = [t for t in GGMLType if t in gguf.quants._type_traits or t in (GGMLType.F32, GGMLType.F16)]


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found.view(np.uint8), np.ascontiguousarray(expected).view(np.uint8))


def random_blocks(ggml_type, n_blocks, seed):
    return np.random.default_rng(seed).integers(0, 256, n_blocks * block_layout(ggml_type)[1], dtype=np.uint8)


def test_types_and_layouts_agree_with_gguf_py():
    for kind, layout in GGML_QUANT_SIZES.items():
        assert GGMLType(kind).name == kind.name
        assert block_layout(GGMLType(kind)) == layout
    assert {t for t in GGMLType if t not in set(GGML_QUANT_SIZES)} <= {GGMLType.Q2_0}


def test_every_type_decodes_or_is_refused():
    for ggml_type in GGMLType:
        per_block, block_bytes = block_layout(ggml_type)
        raw = np.zeros(block_bytes, np.uint8)
        if ggml_type in ACTIVATION_ONLY:
            with pytest.raises(ValueError, match=ggml_type.name):
                dequantize(raw, ggml_type, (per_block,))
        else:
            assert dequantize(raw, ggml_type, (per_block,)).shape == (per_block,)


@pytest.mark.parametrize("ggml_type", IN_GGUF_PY, ids=lambda t: t.name)
def test_random_blocks_decode_as_gguf_py_does(ggml_type):
    # 5 x 32768 elements: several slabs, the last one partial.
    rows, row = 5, 1 << 15
    raw = random_blocks(ggml_type, rows * row // block_layout(ggml_type)[0], seed=int(ggml_type))
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw.reshape(rows, -1), gguf.GGMLQuantizationType(ggml_type))
    assert_same_bits(dequantize(raw, ggml_type, (rows, row)), expected)
    assert_same_bits(dequantize(raw, ggml_type, (rows * row,)), expected.reshape(-1))


@pytest.mark.parametrize("ggml_type", INTEGERS, ids=lambda t: t.name)
def test_integers_and_doubles_keep_their_type(ggml_type):
    raw = random_blocks(ggml_type, 24, seed=1)
    assert_same_bits(dequantize(raw, ggml_type, (2, 3, 4)), raw.view(INTEGERS[ggml_type]).reshape(2, 3, 4))


def test_q1_0_and_q2_0_follow_the_reference_loops():
    """Against `dequantize_row_q1_0` and `dequantize_row_q2_0` of ggml-quants.c, written out as they are there."""
    q1, q2 = random_blocks(GGMLType.Q1_0, 40, seed=2), random_blocks(GGMLType.Q2_0, 40, seed=3)
    with np.errstate(all="ignore"):
        expected_q1, expected_q2 = [], []
        for block in q1.reshape(40, 18):
            d = np.float32(block[:2].view(np.float16)[0])
            expected_q1 += [d if block[2 + j // 8] >> (j % 8) & 1 else -d for j in range(128)]
        for block in q2.reshape(40, 18):
            d = np.float32(block[:2].view(np.float16)[0])
            expected_q2 += [np.float32(int(block[2 + j // 4] >> (j % 4 * 2) & 3) - 1) * d for j in range(64)]
    assert_same_bits(dequantize(q1, GGMLType.Q1_0, (40 * 128,)), np.array(expected_q1, np.float32))
    np.testing.assert_array_equal(dequantize(q2, GGMLType.Q2_0, (40 * 64,)), np.array(expected_q2, np.float32))


@pytest.mark.parametrize("path", data_files("quants/*.gguf"))
def test_files_decode_as_gguf_py_does(data, path):
    if path.stem in ("llama-pure-Q1_0", "llama-pure-Q2_0"):
        pytest.skip("unknown to gguf-py; see the twin test")
    with GGUFFile.open(path) as file:
        reader = gguf.GGUFReader(path)
        assert [t.name for t in reader.tensors] == list(file.tensors)
        for theirs in reader.tensors:
            ours = file.tensors[theirs.name]
            assert (ours.ggml_type, ours.offset) == (theirs.tensor_type, theirs.data_offset)
            assert (ours.n_bytes, ours.n_elements) == (theirs.n_bytes, theirs.n_elements)
            assert ours.shape == tuple(theirs.shape[::-1].tolist())
            assert_same_bits(file.raw(theirs.name), theirs.data.view(np.uint8).reshape(-1))
            assert_same_bits(
                file.tensor(theirs.name), gguf.quants.dequantize(theirs.data, theirs.tensor_type).reshape(ours.shape)
            )


@pytest.mark.parametrize("name", ["Q1_0", "Q2_0"])
def test_files_of_new_formats_equal_their_f32_twins(data, name):
    file = GGUFFile.open(data / "quants" / f"llama-pure-{name}.gguf")
    twin = GGUFFile.open(data / "quants" / f"llama-pure-{name}.dequantized-F32.gguf")
    assert set(file.tensors) == set(twin.tensors)
    assert GGMLType[name] in {info.ggml_type for info in file.tensors.values()}
    for tensor in file.tensors:
        assert_same_bits(file.tensor(tensor), twin.tensor(tensor))


@pytest.mark.parametrize("ggml_type", [t for t in GGMLType if has_big_endian_form(t)], ids=lambda t: t.name)
def test_big_endian_blocks_swap_their_words_only(ggml_type):
    """`to_little_endian` undoes a swap of each word of the C struct, named here by hand."""
    per_block, block_bytes = block_layout(ggml_type)
    halves = {"Q4_0": [0], "Q8_0": [0], "Q4_K": [0, 2], "Q6_K": [208], "MXFP4": [], "NVFP4": []}
    words = [(0, block_bytes)] if per_block == 1 else [(at, 2) for at in halves[ggml_type.name]]
    little = random_blocks(ggml_type, 6, seed=4)
    big = little.reshape(6, block_bytes).copy()
    for block in big:
        for at, size in words:
            block[at : at + size] = block[at : at + size].tolist()[::-1]
    assert_same_bits(to_little_endian(big.reshape(-1), ggml_type), little)


@pytest.mark.parametrize(
    ("n_bytes", "shape"), [(17, (32,)), (18, (64,)), (18, (16, 2)), (18, ())], ids=["bytes", "shape", "row", "scalar"]
)
def test_bytes_that_do_not_fit_the_shape_are_refused(n_bytes, shape):
    with pytest.raises(ValueError, match="Q4_0 do not fill shape"):
        dequantize(np.zeros(n_bytes, np.uint8), GGMLType.Q4_0, shape)
