"""Metadata and tensors of well-formed files, against gguf-py's reader and writer."""

import os
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from oxjax.errors import GGUFError
from oxjax.gguf import GGMLType, GGUFFile
from tests.helpers.data import data_files

SLOW_FOR_GGUF_PY = 1 << 20  # gguf-py parses a large vocabulary for tens of seconds

SCALARS = {
    "u8": ("uint8", 200),
    "i8": ("int8", -100),
    "u16": ("uint16", 60000),
    "i16": ("int16", -30000),
    "u32": ("uint32", 4_000_000_000),
    "i32": ("int32", -2_000_000_000),
    "u64": ("uint64", 2**64 - 1),
    "i64": ("int64", -(2**63)),
    "f32": ("float32", 1.5),
    "f64": ("float64", 0.1),
    "yes": ("bool", True),
    "no": ("bool", False),
    "text": ("string", "naïve \0 🦙"),
}


def write(path, tensors=(), *, big_endian=False, alignment=None, fill=lambda writer: None, **options):
    order = gguf.GGUFEndian.BIG if big_endian else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(path, "llama", endianess=order, **options)
    if alignment:
        writer.add_custom_alignment(alignment)
    fill(writer)
    for name, array in dict(tensors).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_scalars(writer):
    for key, (kind, value) in SCALARS.items():
        getattr(writer, f"add_{kind}")(f"test.{key}", value)


def plain_tensors():
    rng = np.random.default_rng(0)
    shapes = {np.float32: (3, 5), np.float16: (2, 3, 4), np.float64: (7,), np.int8: (9,), np.int16: (2, 2)}
    shapes |= {np.int32: (1, 2, 3, 4), np.int64: (3,)}
    return {f"t.{np.dtype(t).name}": (rng.normal(size=s) * 100).astype(t) for t, s in shapes.items()}


def assert_reads_back(file, tensors):
    assert list(file.tensors) == list(tensors)
    for name, array in tensors.items():
        expected = array.astype(np.float32) if array.dtype == np.float16 else array
        found = file.tensor(name)
        assert found.dtype == expected.dtype and found.dtype.isnative
        assert found.shape == file.tensors[name].shape == expected.shape
        np.testing.assert_array_equal(found, expected)


def plain(value):
    return value.tolist() if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(*p.values, id=p.id, marks=pytest.mark.slow)
        if p.values[0].is_file() and "vocab" in p.values[0].parts and p.values[0].stat().st_size > SLOW_FOR_GGUF_PY
        else p
        for p in data_files("**/*.gguf")
    ],
)
def test_metadata_equals_gguf_py(data, path):
    try:
        reader = gguf.GGUFReader(path)
    except ValueError:
        assert path.stem == "llama-pure-Q2_0", "gguf-py knows every other type"
        pytest.skip("gguf-py does not know the type")
    file = GGUFFile.open(path)
    expected = {k: v.contents() for k, v in reader.fields.items() if not k.startswith("GGUF.")}
    assert list(file.metadata) == list(expected)
    for key, value in expected.items():
        assert plain(file.metadata[key]) == value, key
    assert (file.version, file.byte_order, file.alignment) == (reader.fields["GGUF.version"].contents(), "little", 32)


@pytest.mark.parametrize("path", data_files("vocab/*gemma-4.gguf"))
def test_a_large_vocabulary_opens_and_decodes(data, path, report):
    best_open, best_read = 9.0, 9.0
    for _ in range(3):
        start = time.perf_counter()
        file = GGUFFile.open(path)
        opened = time.perf_counter()
        assert len(file.get_array("tokenizer.ggml.tokens", str)) > 200_000
        assert len(dict(file.metadata)) == len(file.metadata)
        best_open = min(best_open, opened - start)
        best_read = min(best_read, time.perf_counter() - opened)
    report(f"{path.name}: opened in {best_open * 1e3:.0f} ms, all metadata decoded in {best_read * 1e3:.0f} ms")


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("big_endian", [False, True], ids=["little", "big"])
@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
def test_written_files_read_back(tmp_path, version, big_endian, alignment):
    tensors = plain_tensors()
    path = write(tmp_path / "a.gguf", tensors, big_endian=big_endian, alignment=alignment, fill=add_scalars)
    order = "big" if big_endian else "little"
    patched = bytearray(path.read_bytes())
    patched[4:8] = version.to_bytes(4, order)
    path.write_bytes(patched)
    with GGUFFile.open(path) as file:
        assert (file.version, file.byte_order, file.alignment) == (version, order, alignment or 32)
        assert (file.path, file.paths, file.file_size) == (path, (path,), path.stat().st_size)
        for key, (_, value) in SCALARS.items():
            found = file.metadata[f"test.{key}"]
            assert found == value and type(found) is type(value), key
        assert_reads_back(file, tensors)


@pytest.mark.parametrize("big_endian", [False, True], ids=["little", "big"])
def test_arrays_are_typed_and_read_only(tmp_path, big_endian):
    arrays = {name: np.array([0, 1, 100], name) for name in ("uint8", "int16", "uint32", "int64", "float32", "float64")}
    nested = [[[1, 2], [3]], [[4]]]

    def fill(writer):
        for name, array in arrays.items():
            kind = gguf.GGUFValueType[name.upper()]
            writer.add_key_value(f"a.{name}", array.tolist(), gguf.GGUFValueType.ARRAY, sub_type=kind)
        writer.add_array("a.bool", [True, False, True])
        writer.add_array("a.str", ["", "ab", "é"])
        writer.add_array("a.nested", nested)

    file = GGUFFile.open(write(tmp_path / "a.gguf", big_endian=big_endian, fill=fill))
    for name, array in arrays.items():
        found = file.metadata[f"a.{name}"]
        assert found.dtype == array.dtype and not found.flags.writeable
        np.testing.assert_array_equal(found, array)
        assert file.get_array(f"a.{name}", float) is found
    assert file.get_array("a.bool", bool).tolist() == [True, False, True]
    assert file.get_array("a.str", str) == ["", "ab", "é"]
    assert [[plain(row) for row in rows] for rows in file.metadata["a.nested"]] == nested
    for key, kind in {"a.bool": int, "a.float32": int, "a.str": int, "a.uint8": bool, "a.nested": str}.items():
        with pytest.raises(GGUFError, match=f"{key}.*expected array of {kind.__name__}"):
            file.get_array(key, kind)
    with pytest.raises(TypeError):
        file.metadata["a.new"] = 1
    with pytest.raises(TypeError):
        file.tensors["new"] = None


def test_bytes_that_are_not_utf8_survive(tmp_path):
    odd = b"\xff\xfeab\xc3"
    file = GGUFFile.open(
        write(tmp_path / "a.gguf", fill=lambda w: (w.add_string("s", odd), w.add_array("l", [odd, b"ok"])))
    )
    assert file.metadata["s"].encode("utf-8", "surrogateescape") == odd
    assert [s.encode("utf-8", "surrogateescape") for s in file.metadata["l"]] == [odd, b"ok"]


def test_get_checks_the_type(tmp_path):
    file = GGUFFile.open(write(tmp_path / "a.gguf", fill=add_scalars))
    for key, (kind, value) in SCALARS.items():
        own = type(value)
        assert file.get(f"test.{key}", own) == value
        for other in {int, float, bool, str} - {own} - ({float} if own is int else set()):
            with pytest.raises(GGUFError, match=rf"test\.{key}.*found {own.__name__}, expected {other.__name__}"):
                file.get(f"test.{key}", other)
        assert kind
    assert type(file.get("test.u8", float)) is float
    assert file.get("missing", int, None) is None
    assert file.get_array("missing", str, []) == []
    for getter in (file.get, file.get_array):
        with pytest.raises(GGUFError, match=r"'missing': metadata key is missing, expected .*int"):
            getter("missing", int)


def test_quantised_big_endian_blocks_are_converted_or_refused(tmp_path):
    for name, readable in {"Q8_0": True, "Q4_K": True, "Q5_0": False, "IQ4_XS": False}.items():
        kind = gguf.GGMLQuantizationType[name]
        raw = np.random.default_rng(0).integers(0, 60, (2, 256 // 32 * 34 * 33), dtype=np.uint8)
        raw = raw[:, : gguf.GGML_QUANT_SIZES[kind][1] * 2].copy()
        path = tmp_path / f"{name}.gguf"
        writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
        swapped = raw.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1]).copy()
        for at in {"Q8_0": (0,), "Q4_K": (0, 2)}.get(name, ()):
            swapped[:, [at, at + 1]] = swapped[:, [at + 1, at]]
        writer.add_tensor("w", swapped.reshape(raw.shape), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        if readable:
            np.testing.assert_array_equal(GGUFFile.open(path).tensor("w"), gguf.quants.dequantize(raw, kind))
        else:
            with pytest.raises(GGUFError, match=f"'w': ggml defines no big-endian form of {name}"):
                GGUFFile.open(path)


def test_opening_does_not_touch_tensor_data(tmp_path):
    """A file with a hole of 8 GB for its data opens at once, and a small tensor behind the hole is read alone."""
    path = tmp_path / "huge.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor_info("hole", (1 << 31,), np.dtype(np.float32), 1 << 33)
    writer.add_tensor_info("small", (4,), np.dtype(np.float32), 16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = -(-path.stat().st_size // 32) * 32
    os.truncate(path, start + (1 << 33))
    with path.open("ab") as f:
        f.write(np.arange(4, dtype=np.float32).tobytes())
    file = GGUFFile.open(path)
    assert file.tensors["hole"].n_bytes == 1 << 33
    np.testing.assert_array_equal(file.tensor("small"), [0, 1, 2, 3])


def test_raw_is_a_read_only_view_and_outlives_the_file(tmp_path):
    path = write(tmp_path / "a.gguf", {"w": np.arange(8, dtype=np.float32)}, fill=add_scalars)
    with GGUFFile.open(str(path)) as file:
        raw, metadata = file.raw("w"), file.metadata
        assert not raw.flags.owndata and not raw.flags.writeable
        assert np.shares_memory(raw, file.tensor("w"))
        with pytest.raises(GGUFError, match="'v': no such tensor"):
            file.tensor("v")
    assert raw.view(np.float32).tolist() == list(range(8))
    assert metadata["test.u8"] == 200
    with pytest.raises(GGUFError, match="closed"):
        file.raw("w")


def test_scalar_tensors_and_files_without_tensors(tmp_path):
    file = GGUFFile.open(write(tmp_path / "a.gguf", {"s": np.array(3, np.int32)}))
    assert file.tensors["s"].shape == () and file.tensor("s") == 3
    assert file.tensors["s"].ggml_type is GGMLType.I32
    assert not GGUFFile.open(write(tmp_path / "b.gguf")).tensors


def test_the_reader_does_not_import_jax():
    code = "import sys, oxjax.gguf; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
