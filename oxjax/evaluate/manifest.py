"""Manifest: everything that a file of results depends on, written beside it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from datetime import datetime
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from oxjax.engine.snapshot import model_fingerprint
from oxjax.errors import BatchError, InvalidRequestError
from oxjax.evaluate.journal import beside, has_results, journal_path, sync_folder
from oxjax.evaluate.source import Source
from oxjax.gguf import GGUFFile
from oxjax.llm import LLM

_FORMAT = 2


@dataclass
class Manifest:
    """The manifest of an output.

    Attributes:
        depends_on: everything that the bytes of the output depend on: the model's fingerprint and that of its
            tokenizer and chat templates, options, software, device, the input's digest and number of requests, seed,
            date, shard.
        files: paths of model, input and output; the last two are relative to the manifest.
        failed: number of failed requests; None until all are done.
    """

    depends_on: dict[str, Any]
    files: dict[str, str]
    failed: int | None = None

    @classmethod
    def of(
        cls,
        made_with: dict[str, Any],
        model: Path,
        requests: Source,
        output: Path,
        *,
        seed: int,
        date: str,
        shard: tuple[int, int] = (1, 1),
    ) -> Manifest:
        """Build the manifest of a run from the `facts` of its engine.

        Raises:
            InvalidRequestError: `date` is not a date.
        """
        read_day(date)
        return cls(
            {
                **made_with,
                "input_sha256": requests.digest,
                "requests": len(requests),
                "seed": seed,
                "date": date,
                "shard": list(shard),
            },
            {
                "model": str(model.resolve()),
                "input": os.path.relpath(requests.path.resolve(), output.resolve().parent),
                "output": output.name,
            },
        )

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read a manifest.

        Raises:
            BatchError: it cannot be read, or is not a manifest.
        """
        try:
            raw = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise BatchError(f"{path}: cannot be read: {error}") from error
        if not isinstance(raw, dict) or raw.pop("format", None) != _FORMAT:
            raise BatchError(f"{path}: found no manifest of format {_FORMAT}")
        try:
            return cls(**raw)
        except TypeError as error:
            raise BatchError(f"{path}: {error}") from error

    @property
    def run(self) -> str:
        """Identifier of the run: a digest of everything that its results depend on."""
        return blake2b(json.dumps(self.depends_on, sort_keys=True).encode(), digest_size=16).hexdigest()

    def check(self, output: Path) -> None:
        """Check that existing results depend on the same facts.

        Raises:
            BatchError: they do not, or have no manifest.
        """
        path = manifest_path(output)
        if not has_results(output):
            return
        if not path.exists():
            raise BatchError(
                f"{output}: it is there, or its journal {journal_path(output)} is, without a manifest {path}: name "
                "another output, or delete them"
            )
        there = Manifest.read(path).depends_on
        if wrong := [f"{name}: {there.get(name)}" for name, fact in self.depends_on.items() if there.get(name) != fact]:
            raise BatchError(
                f"{path}: the results that are there depend on another {'; '.join(wrong)}: name another output, or "
                f"delete that one, and {journal_path(output)} if it is there"
            )

    def write(self, output: Path) -> None:
        """Write the manifest beside an output, atomically.

        Raises:
            BatchError: it cannot be written.
        """
        path = manifest_path(output)
        fresh = path.with_name(path.name + ".new")
        try:
            with fresh.open("w", encoding="utf-8") as file:
                file.write(json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
            sync_folder(path)
        except OSError as error:
            raise BatchError(f"{path}: cannot be written: {error.strerror}") from error


def facts(llm: LLM) -> dict[str, Any]:
    """Facts that all results of an engine depend on."""
    sizes = {} if llm.config.numerics.exact else {"max_batch": llm.max_batch, "max_rows": llm.max_rows}
    return {
        "model": model_fingerprint(llm.config, llm.model.params),
        "tokenizer": _tokenizer_fingerprint(llm.path),
        "options": llm.options | sizes,
        "software": {name: version(name) for name in ("oxjax", "jax", "jaxlib")},
        "device": {"platform": jax.default_backend(), "kind": jax.local_devices()[0].device_kind},
    }


def _tokenizer_fingerprint(path: Path) -> str:
    """Hash of the vocabulary and chat templates of a model file, with all settings of both."""
    digest = blake2b(digest_size=16, person=b"oxjax tokenizer")
    with GGUFFile.open(path) as file:
        for key in sorted(key for key in file.metadata if key.startswith("tokenizer.")):
            value = file.metadata[key]
            items = value if isinstance(value, list | np.ndarray) else [value]
            digest.update(json.dumps([key, *map(str, items)]).encode())
    return digest.hexdigest()


def day_of(output: Path) -> str:
    """Date in the manifest of an output; today if there is none."""
    path = manifest_path(output)
    if not (path.exists() and has_results(output)):
        return today()
    return str(Manifest.read(path).depends_on.get("date"))


def read_day(date: str) -> datetime:
    """Parse a date, YYYY-MM-DD.

    Raises:
        InvalidRequestError: it is not a date.
    """
    try:
        return datetime.strptime(date, "%Y-%m-%d")
    except ValueError:
        raise InvalidRequestError(f"date {date!r}: expected YYYY-MM-DD") from None


def today() -> str:
    """Today's date, YYYY-MM-DD."""
    return datetime.now().strftime("%Y-%m-%d")


def manifest_path(output: Path) -> Path:
    """Path of the manifest of an output."""
    return beside(output, ".manifest.json")
