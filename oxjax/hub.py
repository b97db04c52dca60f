"""Where a model comes from: a path, or `hf://org/repo/file.gguf`."""

from __future__ import annotations

import re
from pathlib import Path

from oxjax.errors import ModelError

_SCHEME = "hf://"


def resolve(model: str | Path) -> Path:
    """The local path of a model, downloaded to the Hugging Face cache if it is not there.

    Args:
        model: a path, or `hf://org/repo/path/in/repo.gguf`, with `@revision` after the repository if wanted.
            Of a split model, naming any shard fetches all.

    Raises:
        ModelError: the address is malformed, or the file cannot be had.
    """
    if not str(model).startswith(_SCHEME):
        return Path(model)
    # Slow to import, and only needed here.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    org, _, rest = str(model).removeprefix(_SCHEME).partition("/")
    repo, _, filename = rest.partition("/")
    repo, _, revision = repo.partition("@")
    if not (org and repo and filename):
        raise ModelError(f"{model!r}: expected hf://org/repo/file.gguf")
    try:
        paths = [hf_hub_download(f"{org}/{repo}", name, revision=revision or None) for name in _shards_of(filename)]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        raise ModelError(f"{model}: cannot be fetched: {e}") from e
    return Path(paths[0])


def _shards_of(filename: str) -> list[str]:
    """The file itself, or all files of its set where it is named like a shard; the first comes first."""
    match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", filename)
    if match is None:
        return [filename]
    stem, count = match[1], int(match[2])
    return [f"{stem}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]
