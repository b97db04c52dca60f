"""Where a model comes from: a path, or `hf://org/repo/file.gguf`."""

from __future__ import annotations

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

    from oxjax.gguf import shard_names

    org, _, rest = str(model).removeprefix(_SCHEME).partition("/")
    repo, _, filename = rest.partition("/")
    repo, _, revision = repo.partition("@")
    if not (org and repo and filename):
        raise ModelError(f"{model!r}: expected hf://org/repo/file.gguf")
    try:
        paths = [hf_hub_download(f"{org}/{repo}", name, revision=revision or None) for name in shard_names(filename)]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        raise ModelError(f"{model}: cannot be fetched: {e}") from e
    return Path(paths[0])
