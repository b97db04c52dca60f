"""Models in several files, and directories that hold a model."""

import struct

import gguf
import numpy as np
import pytest

from oxjax.errors import GGUFError
from oxjax.gguf import GGUFFile

TENSORS = {f"blk.{i}.w": np.full((2, 32), i, np.float32) for i in range(5)}


def split_model(folder, name="model", **options):
    """Three shards of two, two and one tensor."""
    folder.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(folder / f"{name}.gguf", "llama", split_max_tensors=2, **options)
    writer.add_string("general.name", "split")
    for key, value in TENSORS.items():
        writer.add_tensor(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [folder / f"{name}-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]


def single_model(path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def patch(path, key, value):
    """Overwrite an integer of the metadata in place."""
    data = bytearray(path.read_bytes())
    at = data.index(key.encode()) + len(key)
    size = {4: 2, 5: 4, 2: 2, 3: 2}[struct.unpack_from("<I", data, at)[0]]
    data[at + 4 : at + 4 + size] = value.to_bytes(size, "little")
    path.write_bytes(data)


@pytest.mark.parametrize("big_endian", [False, True], ids=["little", "big"])
def test_any_shard_or_the_directory_opens_the_whole(tmp_path, big_endian):
    order = gguf.GGUFEndian.BIG if big_endian else gguf.GGUFEndian.LITTLE
    shards = split_model(tmp_path / "m", endianess=order)
    for path in [*shards, tmp_path / "m"]:
        file = GGUFFile.open(path)
        assert (file.path, file.paths) == (shards[0], tuple(shards))
        assert file.file_size == sum(p.stat().st_size for p in shards)
        assert file.metadata["general.name"] == "split"
        assert list(file.tensors) == list(TENSORS)
        assert [info.path for info in file.tensors.values()] == [shards[i] for i in (0, 0, 1, 1, 2)]
        for name, expected in TENSORS.items():
            np.testing.assert_array_equal(file.tensor(name), expected)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_shard_is_named(tmp_path, missing):
    shards = split_model(tmp_path)
    shards[missing].unlink()
    with pytest.raises(GGUFError, match=f"{shards[missing].name}: shard {missing + 1} of 3 is missing"):
        GGUFFile.open(shards[(missing + 1) % 3])


@pytest.mark.parametrize(
    ("shard", "key", "value", "message"),
    [
        (0, "split.no", 1, "'split.no': found 1, expected 0"),
        (1, "split.no", 0, "'split.no': found 0, expected 1"),
        (1, "split.count", 4, "'split.count': found 4, expected 3"),
        (2, "split.tensors.count", 7, "'split.tensors.count': found 7, expected 5"),
        (0, "split.count", 65535, "'split.count': 65535 files by the metadata, but shard 1 of 3 by the name"),
        (0, "split.count", 0, "'split.count': 1 files by the metadata, but shard 1 of 3 by the name"),
    ],
)
def test_shards_that_contradict_each_other_are_refused(tmp_path, shard, key, value, message):
    shards = split_model(tmp_path)
    patch(shards[shard], key, value)
    with pytest.raises(GGUFError, match=message):
        GGUFFile.open(shards[0])


def test_the_declared_tensor_count_is_checked(tmp_path):
    shards = split_model(tmp_path)
    for path in shards:
        patch(path, "split.tensors.count", 6)
    with pytest.raises(GGUFError, match="6 tensors declared, 5 found in 3 files"):
        GGUFFile.open(shards[1])


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    shards = split_model(tmp_path)
    shards[2].write_bytes(shards[2].read_bytes().replace(b"blk.4.w", b"blk.0.w"))
    with pytest.raises(
        GGUFError, match=f"{shards[2].name}.*'blk.0.w': duplicate tensor name, also in {shards[0].name}"
    ):
        GGUFFile.open(shards[0])


def test_a_renamed_shard_says_how_shards_are_named(tmp_path):
    shards = split_model(tmp_path)
    for name in ("model.gguf", "model-00001-of-00002.gguf", "model-00004-of-00003.gguf"):
        renamed = shards[0].rename(tmp_path / name)
        with pytest.raises(GGUFError, match="shards are named like"):
            GGUFFile.open(renamed)
        renamed.rename(shards[0])


def test_shards_of_different_byte_order_are_refused(tmp_path):
    little = split_model(tmp_path / "little")
    big = split_model(tmp_path / "big", endianess=gguf.GGUFEndian.BIG)
    little[1].write_bytes(big[1].read_bytes())
    with pytest.raises(GGUFError, match=r"big-endian, but model-00001-of-00003\.gguf is little-endian"):
        GGUFFile.open(little[0])


def test_a_directory_must_hold_one_model(tmp_path):
    with pytest.raises(GGUFError, match=r"directory without a \.gguf file"):
        GGUFFile.open(tmp_path)
    (tmp_path / "readme.txt").write_text("no model")
    only = single_model(tmp_path / "a.gguf")
    assert GGUFFile.open(tmp_path).path == only
    split_model(tmp_path, "b")
    with pytest.raises(GGUFError, match=r"2 models, name one: a\.gguf, b \(3 shards\)"):
        GGUFFile.open(tmp_path)


def test_a_file_named_as_the_only_shard_is_a_whole_model(tmp_path):
    path = single_model(tmp_path / "a-00001-of-00001.gguf")
    assert GGUFFile.open(path).paths == (path,)
