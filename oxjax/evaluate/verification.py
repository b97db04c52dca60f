"""Verification: results are recomputed and compared byte by byte."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from oxjax.errors import BatchError, InvalidRequestError
from oxjax.evaluate.batch import answer
from oxjax.evaluate.manifest import Manifest, facts
from oxjax.evaluate.source import Source
from oxjax.llm import LLM


@dataclass(frozen=True)
class Verification:
    """Result of a verification.

    Attributes:
        n_results: number of results in the file.
        n_checked: number of results that were computed again.
        differing: line numbers in the input of results that differ.
        changed: facts that differ from the manifest, software for example.
    """

    n_results: int
    n_checked: int
    differing: list[int]
    changed: list[str]


def verify(
    manifest: str | Path,
    *,
    llm: LLM | None = None,
    model: str | Path | None = None,
    sample: int | None = 100,
    seed: int = 0,
) -> Verification:
    """Compute a sample of results again, and compare their bytes with those in the file.

    Args:
        manifest: of the output, which is beside it; the input is at its old place.
        llm: the model; None loads it with the options of the manifest.
        model: its new path, if it has moved.
        sample: number of results; None checks all.
        seed: of the choice of the sample.

    Raises:
        BatchError: the files are not those of the manifest, the model is another one, or the results were not made in
            exact mode, without which their bits depend on each other.
        InvalidRequestError: `sample` is not a positive number.
    """
    if sample is not None and sample < 1:
        raise InvalidRequestError(f"sample {sample}: expected at least 1, or None for all")
    path = Path(manifest)
    there = Manifest.read(path)
    if not there.depends_on["options"]["exact"]:
        raise BatchError(f"{path}: made in fast mode, where a result's last bits depend on what runs beside it")
    if llm is None:
        with LLM(there.files["model"] if model is None else model, **there.depends_on["options"]) as loaded:
            return verify(manifest, llm=loaded, sample=sample, seed=seed)
    output, shard = path.parent / there.files["output"], tuple(there.depends_on["shard"])
    requests = Source(path.parent / there.files["input"], shard)
    seed_of_run, date = there.depends_on["seed"], there.depends_on["date"]
    here = Manifest.of(facts(llm), llm.path, requests, output, seed=seed_of_run, date=date, shard=shard).depends_on
    changed = {
        name: f"{name}: {fact}, here {here[name]}" for name, fact in there.depends_on.items() if here[name] != fact
    }
    if fatal := [text for name, text in changed.items() if name in ("model", "input_sha256", "requests")]:
        raise BatchError(f"{path}: {'; '.join(fatal)}")
    results = _lines(output)
    if len(results) > len(requests):
        raise BatchError(f"{output}: it has {len(results)} results, and there are {len(requests)} requests")
    n = len(results) if sample is None else min(sample, len(results))
    places, differing = sorted(random.Random(seed).sample(range(len(results)), n)), []
    numbers = {line.place: line.number for line in requests.lines(iter(places))}
    with output.open("rb") as file:
        for answers in answer(llm, requests.lines(iter(places)), seed_of_run, date):
            for found in answers:
                file.seek(results[found.place])
                if file.readline() != found.line:
                    differing.append(numbers[found.place])
    return Verification(len(results), n, sorted(differing), list(changed.values()))


def _lines(output: Path) -> list[int]:
    """Offsets of the lines of a file, except an incomplete one at its end."""
    starts, offset = [], 0
    try:
        with output.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    starts.append(offset)
                offset += len(line)
    except OSError as error:
        raise BatchError(f"{output}: cannot be read: {error.strerror}") from error
    return starts
