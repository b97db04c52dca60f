"""Batch runs on many machines: a pool of Ray actors with an engine each."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

from oxjax.errors import BatchError
from oxjax.evaluate.batch import Answer, Progress, Steps, Summary, answer, record
from oxjax.evaluate.manifest import Manifest, day_of, facts, today
from oxjax.evaluate.source import Line, Source
from oxjax.llm import LLM

try:
    import pyarrow as pa
    import ray
    from ray.data import ActorPoolStrategy, Dataset
    from ray.exceptions import RayError, RayTaskError
except ImportError as error:
    raise BatchError(f"Ray Data cannot be imported ({error}): pip install 'oxjax[ray]'") from error

BLOCK = 128  # requests that an actor takes at once, and loses at most when it dies
_IN_FLIGHT = 2  # blocks per actor: the next one waits there already
_LINES = pa.schema({"place": pa.int64(), "number": pa.int64(), "text": pa.binary(), "repeats": pa.bool_()})
_ANSWERS = pa.schema({"place": pa.int64(), "line": pa.binary(), "error": pa.string()})


def run(
    source: str | Path,
    output: str | Path,
    model: str | Path | None = None,
    *,
    actors: int,
    per_actor: Mapping[str, Any] | None = None,
    block: int = BLOCK,
    seed: int = 0,
    date: str | None = None,
    on_error: str = "continue",
    progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> Summary:
    """Run the requests of a file as `oxjax.evaluate.run` does, on actors of the connected Ray cluster.

    In exact mode output and manifest are the same to the byte. A block whose actor died runs again on another, and
    what was written when this process died is not computed again, here or by `oxjax.evaluate.run`.

    Args:
        source, output: see `oxjax.evaluate.run`; files of this machine.
        model: see `LLM`; a path is one that every machine of the cluster can read.
        actors: number of actors, each with an engine.
        per_actor: resources of an actor, named as in `ray.data.Dataset.map_batches`: `num_cpus`, which is also its
            number of threads (1), `num_gpus`, `resources`, `runtime_env` and others.
        block: number of requests that an actor takes at once.
        seed, date, on_error, progress: see `oxjax.evaluate.run`; stops and progress are between two blocks.
        options: of `LLM`.

    Raises:
        BatchError: as for `oxjax.evaluate.run`; or the model cannot be loaded, the machines of the cluster would not
            give the same answers, or Ray failed.
    """
    if actors < 1 or block < 1:
        raise BatchError(f"actors {actors}, block {block}: expected at least 1")
    output, requests, per_actor = Path(output), Source(Path(source)), dict(per_actor or {})
    made_with, path = _ask_a_worker(model, options, per_actor)
    date = day_of(output) if date is None else date
    manifest = Manifest.of(made_with, path, requests, output, seed=seed, date=date)

    def found(lines: Iterator[Line]) -> Steps:
        tables = iter(lambda: [line._asdict() for line in islice(lines, block)], [])
        refs: list[Any] = [ray.put(pa.Table.from_pylist(table, _LINES)) for table in tables]
        if not refs:
            return
        answers = _map(
            ray.data.from_arrow_refs(refs),
            FileAnswers,
            (model, options, seed, date, made_with),
            actors,
            block,
            per_actor,
        )
        try:
            for table in answers.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield [Answer(**row) for row in cast("pa.Table", table).to_pylist()]
        except RayError as error:
            raise BatchError(f"{source}: Ray gave up: {error}") from error

    return record(requests, output, manifest, found, on_error=on_error, progress=progress)


def map_requests(
    dataset: Dataset,
    model: str | Path | None = None,
    *,
    actors: int,
    column: str = "request",
    per_actor: Mapping[str, Any] | None = None,
    block: int = BLOCK,
    seed: int = 0,
    date: str | None = None,
    **options: Any,
) -> Dataset:
    """Answers to the requests in a dataset, in a new column `answer`, where they are the lines of an output of `run`.

    Repeated `custom_id`s are not detected, and errors have no line number.

    Args:
        dataset: its rows stay as they are.
        column: column of the requests, in the format of the lines of a request file.
        model, actors, per_actor, block, seed, options: see `run`.
        date: YYYY-MM-DD, today's date for chat templates; None is today.
    """
    date = today() if date is None else date
    return _map(dataset, DatasetAnswers, (model, options, seed, date, column), actors, block, dict(per_actor or {}))


class FileAnswers:
    """Answers requests of a file; Ray makes one in every actor.

    Args:
        model, options, seed, date: see `run`.
        made_with: `facts` of the run; the engine must have the same.

    Raises:
        BatchError: it has others.
    """

    def __init__(
        self, model: str | Path | None, options: dict[str, Any], seed: int, date: str, made_with: dict[str, Any]
    ):
        self.llm, self.seed, self.date = _load(model, options), seed, date
        here = facts(self.llm)
        if wrong := [f"{name}: {here[name]}, not {fact}" for name, fact in made_with.items() if here[name] != fact]:
            raise BatchError(f"machine {ray.util.get_node_ip_address()} would give other results: {'; '.join(wrong)}")

    def __call__(self, table: pa.Table) -> pa.Table:
        """Answers of lines."""
        answers = _answers(self.llm, [Line(**row) for row in table.to_pylist()], self.seed, self.date)
        return pa.Table.from_pylist([a._asdict() for a in answers], _ANSWERS)


class DatasetAnswers:
    """Answers requests of a dataset; Ray makes one in every actor.

    Args:
        model, options, seed, date: see `map_requests`.
        column: column of the requests.
    """

    def __init__(self, model: str | Path | None, options: dict[str, Any], seed: int, date: str, column: str):
        self.llm, self.seed, self.date, self.column = _load(model, options), seed, date, column

    def __call__(self, table: pa.Table) -> pa.Table:
        """The table with answers."""
        texts = table[self.column].cast(pa.binary()).to_pylist()
        lines = [Line(place, None, text or b"", repeats=False) for place, text in enumerate(texts)]
        answers = [a.line.decode().rstrip("\n") for a in _answers(self.llm, lines, self.seed, self.date)]
        return table.append_column("answer", pa.array(answers, pa.string()))


def _answers(llm: LLM, lines: list[Line], seed: int, date: str) -> list[Answer]:
    """Answers in the order of their requests."""
    return sorted(a for answers in answer(llm, lines, seed, date) for a in answers)


def _map(
    dataset: Dataset, answers: type, arguments: tuple[Any, ...], actors: int, block: int, per_actor: dict[str, Any]
) -> Dataset:
    return dataset.map_batches(
        answers,
        fn_constructor_args=arguments,
        batch_size=block,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=_IN_FLIGHT),
        **per_actor,
    )


def _ask_a_worker(
    model: str | Path | None, options: dict[str, Any], per_actor: dict[str, Any]
) -> tuple[dict[str, Any], Path]:
    """`facts` of an engine, and where its model is: this machine may have neither the model nor its accelerator."""
    try:
        # A process of its own, which ends: nothing of the accelerator stays taken.
        return ray.get(ray.remote(max_calls=1, **per_actor)(_describe).remote(model, options))
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        raise BatchError(f"Ray gave up loading {model}: {error}") from error


def _describe(model: str | Path | None, options: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    with _load(model, options) as llm:
        return facts(llm), llm.path


def _load(model: str | Path | None, options: dict[str, Any]) -> LLM:
    """Load an engine with one thread per CPU of this worker."""
    if cpus := ray.get_runtime_context().get_assigned_resources().get("CPU"):
        os.environ.setdefault("PJRT_NPROC", str(math.ceil(cpus)))  # read when jax finds its devices
    return LLM(model, **options)
