"""Files that lie, are cut short or were corrupted end in GGUFError, quickly and without big allocations."""

import os
import random
import signal
import struct
import time
import tracemalloc
from contextlib import contextmanager

import gguf
import numpy as np
import pytest

from oxjax.errors import GGUFError
from oxjax.gguf import GGMLType, GGUFFile
from oxjax.gguf.quants import has_big_endian_form
from tests.helpers.data import DATA

SLACK = 1 << 20
SECONDS_EACH = 30.0  # a mutation takes milliseconds; this tells a hang from a busy machine
HUGE = 2**64 - 1


def u32(n):
    return struct.pack("<I", n)


def u64(n):
    return struct.pack("<Q", n)


def text(s, length=None):
    s = s if isinstance(s, bytes) else s.encode()
    return u64(len(s) if length is None else length) + s


def kv(key, kind, value):
    return text(key) + u32(kind) + value


def info(name="w", dims=(32,), kind=0, offset=0, n_dims=None):
    return (
        text(name) + u32(len(dims) if n_dims is None else n_dims) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)
    )


def build(kvs=(), infos=(), data=b"\0" * 128, *, version=3, n_kv=None, n_infos=None, alignment=32):
    head = b"GGUF" + u32(version)
    head += u64(len(infos) if n_infos is None else n_infos) + u64(len(kvs) if n_kv is None else n_kv)
    head += b"".join(kvs) + b"".join(infos)
    return head + b"\0" * (-len(head) % alignment) + (data if infos else b"")


def nested(depth):
    return (u32(9) + u64(1)) * depth


def align(n, kind=4):
    return kv("general.alignment", kind, u32(n))


LIES = {
    "empty file": (b"", "magic", "an empty file"),
    "not GGUF": (b"PK\3\4" + bytes(60), "magic", "not a GGUF file"),
    "only magic": (b"GGUF", "version", "truncated"),
    "version 0": (build(version=0), "version", "version 0"),
    "version 1": (build(version=1), "version", "GGUF version 1, supported are 2 and 3"),
    "version 4": (build(version=4), "version", "version 4"),
    "no counts": (b"GGUF" + u32(3), "tensor_count", "truncated"),
    "half a count": (b"GGUF" + u32(3) + u64(0) + b"\0", "metadata_kv_count", "truncated"),
    "too many pairs": (build(n_kv=HUGE), "metadata_kv_count", str(HUGE)),
    "too many tensors": (build(n_infos=HUGE), "tensor_count", str(HUGE)),
    "one pair too many": (build([kv("a", 0, b"\1")], n_kv=2), "metadata_kv[1].key", ""),
    "one tensor too many": (build([], [info()], n_infos=2), "tensor_info[1].name", "empty tensor name"),
    "key length": (build([text("abc", HUGE)]), "metadata_kv[0].key", str(HUGE)),
    "key past the end": (build([text("abc", 60000)]), "metadata_kv[0].key", "truncated"),
    "empty key": (build([kv("", 0, b"\1")]), "metadata_kv[0].key", "empty key"),
    "duplicate key": (build([kv("a", 0, b"\1"), kv("a", 0, b"\2")]), "a", "duplicate key"),
    "value type": (build([kv("a", 13, b"\1")]), "a", "unknown value type 13"),
    "item type": (build([kv("a", 9, u32(HUGE >> 32) + u64(0))]), "a", "unknown value type"),
    "value cut": (build([kv("a", 10, b"\1\2")], alignment=1), "a", "truncated"),
    "bool of 2": (build([kv("a", 7, b"\2")]), "a", "bool holds 2"),
    "bool of 255 in an array": (build([kv("a", 9, u32(7) + u64(3) + b"\0\1\xff")]), "a", "bool holds 255"),
    "string length": (build([kv("a", 8, text("b", HUGE))]), "a", str(HUGE)),
    "string past the end": (build([kv("a", 8, text("b", 2**40))]), "a", "truncated"),
    "numbers past the end": (build([kv("a", 9, u32(12) + u64(2**61))]), "a", "truncated"),
    "count that overflows": (build([kv("a", 9, u32(12) + u64(HUGE))]), "a", "truncated"),
    "strings past the end": (build([kv("a", 9, u32(8) + u64(HUGE))]), "a", "truncated"),
    "string in array past the end": (build([kv("a", 9, u32(8) + u64(1) + text("b", 2**63))]), "a", "truncated"),
    "last string cut": (build([kv("a", 9, u32(8) + u64(2) + text("b" * 9) + b"\1")], alignment=1), "a", "truncated"),
    "too many inner arrays": (build([kv("a", 9, u32(9) + u64(HUGE))]), "a", "inner arrays"),
    "nested too deep": (build([kv("a", 9, nested(5000))]), "a", "nested"),
    "alignment 0": (build([align(0)], [info()]), "general.alignment", "alignment 0"),
    "alignment 4": (build([align(4)], [info()]), "general.alignment", "alignment 4"),
    "alignment 48": (build([align(48)], [info()]), "general.alignment", "alignment 48"),
    "alignment of another type": (build([align(32, kind=5)], [info()]), "general.alignment", "expected UINT32"),
    "huge alignment": (build([align(2**31)], [info()]), "w", "truncated"),
    "tensor name length": (build([], [text("w", HUGE)]), "tensor_info[0].name", str(HUGE)),
    "long tensor name": (build([], [info("w" * 65)]), "tensor_info[0].name", "65"),
    "duplicate tensor": (build([], [info(), info(offset=128)], bytes(256)), "w", "duplicate tensor name"),
    "five dimensions": (build([], [info(dims=(2,) * 5)]), "w", "5 dimensions"),
    "n_dims": (build([], [info(n_dims=2**32 - 1)]), "w", "dimensions"),
    "zero dimension": (build([], [info(dims=(32, 0))]), "w", "empty tensor"),
    "dims that overflow": (build([], [info(dims=(2**32, 2**32))]), "w", "truncated"),
    "dims that wrap to 32": (build([], [info(dims=(2**63, 2, 1, 32))]), "w", "truncated"),
    "unknown type": (build([], [info(kind=43)]), "w", "unknown tensor type 43"),
    "removed type": (build([], [info(kind=4)]), "w", "unknown tensor type 4"),
    "activation type Q8_1": (build([], [info(kind=9)]), "w", "Q8_1"),
    "activation type Q8_K": (build([], [info(dims=(256,), kind=15)], bytes(400)), "w", "Q8_K"),
    "row is no multiple": (build([], [info(dims=(16, 2), kind=2)]), "w", "blocks of 32"),
    "scalar of blocks": (build([], [info(dims=(), kind=2)]), "w", "blocks of 32"),
    "misaligned": (build([], [info(offset=16)], bytes(256)), "w", "not a multiple of the alignment 32"),
    "offset past the end": (build([], [info(offset=2**63)]), "w", "truncated"),
    "last byte missing": (build([], [info()])[:-1], "w", "truncated"),
    "overlap": (build([], [info("v"), info("w", offset=96)], bytes(256)), "w", "overlaps tensor 'v'"),
    "same place": (build([], [info("v"), info("w")]), "w", "overlaps tensor 'v'"),
}


def read_all(file):
    """Use everything that a file which opened promises; tensors stay small here."""
    for name, tensor in file.tensors.items():
        assert file.raw(name).nbytes == tensor.n_bytes
        assert file.tensor(name).shape == tensor.shape
    assert len(dict(file.metadata)) == len(file.metadata)


@contextmanager
def no_hang(seconds):
    def stop(*_):
        raise TimeoutError(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", LIES)
def test_each_lie_is_named(tmp_path, name):
    content, field, message = LIES[name]
    path = tmp_path / "lie.gguf"
    path.write_bytes(content)
    with no_hang(30), pytest.raises(GGUFError) as caught:
        GGUFFile.open(path)
    assert (caught.value.path, caught.value.field) == (str(path), field)
    assert message in caught.value.reason
    assert caught.value.offset is not None


def test_the_honest_version_of_the_lies_opens(tmp_path):
    path = tmp_path / "honest.gguf"
    path.write_bytes(build([kv("a", 9, u32(8) + u64(1) + text("b")), align(64)], [info(dims=(16, 2))], alignment=64))
    file = GGUFFile.open(path)
    assert (file.metadata["a"], file.tensor("w").shape) == (["b"], (2, 16))


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path / "missing.gguf", tmp_path / "pipe.gguf", tmp_path / "nul\0.gguf", tmp_path / ("x" * 300)):
        with no_hang(30), pytest.raises(GGUFError):
            GGUFFile.open(path)


def test_a_header_without_end_is_given_up(tmp_path):
    """A string array that claims all of a file of 8 GB of zeros stops at the longest header."""
    path = tmp_path / "long.gguf"
    path.write_bytes(build([kv("a", 9, u32(8) + u64(2**29))]))
    os.truncate(path, 1 << 33)
    with no_hang(30), pytest.raises(GGUFError, match="no header goes past"):
        GGUFFile.open(path)


def rich_file(path, big_endian=False):
    """A file with every value type and several tensor types, small enough that most mutations hit something."""
    order = gguf.GGUFEndian.BIG if big_endian else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(path, "llama", endianess=order)
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64"):
        getattr(writer, f"add_{kind}")(f"scalar.{kind}", 7)
        array = gguf.GGUFValueType[kind.upper()]
        writer.add_key_value(f"array.{kind}", [1, 2, 3], gguf.GGUFValueType.ARRAY, sub_type=array)
    writer.add_bool("scalar.bool", True)
    writer.add_array("array.bool", [True, False])
    writer.add_array("array.string", ["a", "", "ü" * 20])
    writer.add_array("array.nested", [[[1], [2, 3]], [[4]]])
    writer.add_custom_alignment(64)
    rng = np.random.default_rng(0)
    for kind, (per_block, n_bytes) in gguf.GGML_QUANT_SIZES.items():
        if (
            per_block > 1
            and kind.name not in ("Q8_1", "Q8_K")
            and (has_big_endian_form(GGMLType(kind)) or not big_endian)
        ):
            writer.add_tensor(f"w.{kind.name}", rng.integers(0, 256, (2, n_bytes), np.uint8), raw_dtype=kind)
    for dtype in (np.float32, np.float16, np.float64, np.int8, np.int64):
        writer.add_tensor(f"w.{np.dtype(dtype).name}", np.ones((2, 3, 4), dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def mutate(rng, original, header_end):
    """One to three corruptions, most of them in the header: flips, overwritten fields, cuts, lost or doubled pieces."""
    data = bytearray(original)
    for _ in range(rng.choice((1, 1, 2, 3))):
        zones = ((0, 64), (0, 1024), (header_end - 4096, header_end), (0, header_end), (0, header_end), (0, len(data)))
        low, high = rng.choice(zones)
        at = min(rng.randrange(max(low, 0), high), len(data) - 1)
        match rng.randrange(6):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + 4] = u32(rng.choice((0, 1, 7, 8, 9, 13, 40, 2**31 - 1, 2**31, 2**32 - 1)))
            case 2:
                lies = (0, 1, 5, len(data), len(data) - at, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, HUGE)
                data[at : at + 8] = u64(rng.choice(lies))
            case 3:
                data[at : at + rng.randrange(1, 32)] = rng.randbytes(16)
            case 4:
                del data[at if rng.random() < 0.5 else at + rng.randrange(1, 64) : len(data)]
            case 5:
                data[at:at] = data[at : at + rng.randrange(1, 256)]
        if not data:
            break
    return bytes(data)


def fuzz(original, tmp_path, n, seed):
    """Open `n` mutations of a file; count those that still open."""
    path, rng, opened = tmp_path / "mutant.gguf", random.Random(seed), 0
    path.write_bytes(original)
    file = GGUFFile.open(path)
    header_end = min((t.offset for t in file.tensors.values()), default=len(original))
    read_all(file)
    for i in range(n):
        mutant = mutate(rng, original, header_end)
        path.write_bytes(mutant)
        start = time.perf_counter()
        tracemalloc.start()
        try:
            file = GGUFFile.open(path)
        except GGUFError as error:
            file = None
            assert error.path == str(path) and len(str(error)) < 100_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= len(mutant) + SLACK, f"mutation {i}: {peak} bytes allocated for a file of {len(mutant)}"
        if file is not None:
            opened += 1
            read_all(file)
        assert time.perf_counter() - start < SECONDS_EACH, f"mutation {i}"
    return opened


FUZZED = [
    "models/stories260K/stories260K.gguf",
    "quants/llama-pure-IQ1_M.gguf",
    "archs/llama.gguf",
    "vocab/ggml-vocab-bert-bge.gguf",
    "vocab/ggml-vocab-llama-spm.gguf",
]


@pytest.mark.parametrize("big_endian", [False, True], ids=["little", "big"])
def test_mutations_of_a_rich_file(tmp_path, big_endian):
    original = rich_file(tmp_path / "rich.gguf", big_endian).read_bytes()
    with no_hang(120):
        opened = fuzz(original, tmp_path, n=125, seed=0)
    # Both outcomes must be common, or the mutations miss what they aim at.
    assert 5 < opened < 120


@pytest.mark.parametrize("name", FUZZED)
def test_mutations_of_real_files(data, tmp_path, name):
    with no_hang(120):
        fuzz((data / name).read_bytes(), tmp_path, n=30, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("big_endian", [False, True], ids=["little", "big"])
def test_many_mutations_of_a_rich_file(tmp_path, big_endian):
    original = rich_file(tmp_path / "rich.gguf", big_endian).read_bytes()
    fuzz(original, tmp_path, n=5000, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in sorted(DATA.glob("**/*.gguf"))])
def test_many_mutations_of_real_files(tmp_path, path):
    if path.stat().st_size > 8 << 20:
        pytest.skip("large")
    fuzz(path.read_bytes(), tmp_path, n=50, seed=3)
