"""`hf://` against a cache on disk, as huggingface_hub lays it out; nothing is fetched."""

import pytest

from oxjax.errors import ModelError
from oxjax.hub import resolve


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that holds one revision of org/repo, and a hub that may not be called."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "models--org--repo"
    commit = "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "refs" / "v2").write_text(commit)
    snapshot = repo / "snapshots" / commit
    for name in ("model.gguf", "q8/model-00001-of-00002.gguf", "q8/model-00002-of-00002.gguf"):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(b"GGUF")
    return snapshot


def test_a_cached_file_is_found(cache):
    assert resolve("hf://org/repo/model.gguf") == cache / "model.gguf"
    assert resolve("hf://org/repo@v2/model.gguf") == cache / "model.gguf"


def test_any_shard_brings_the_set(cache):
    assert resolve("hf://org/repo/q8/model-00002-of-00002.gguf") == cache / "q8" / "model-00001-of-00002.gguf"


def test_what_cannot_be_had_is_a_typed_error(cache):
    with pytest.raises(ModelError, match=r"other\.gguf"):
        resolve("hf://org/repo/other.gguf")


@pytest.mark.parametrize("address", ["hf://org/repo", "hf://org", "hf://", "hf:///repo/file.gguf"])
def test_malformed_addresses_are_refused(address):
    with pytest.raises(ModelError, match="expected hf://"):
        resolve(address)


def test_a_path_stays_a_path(tmp_path):
    assert resolve(tmp_path) == tmp_path
