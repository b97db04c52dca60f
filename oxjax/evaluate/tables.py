"""Tables of results: NumPy arrays, pandas or Arrow."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from oxjax.errors import BatchError, InvalidRequestError
from oxjax.results import Result

_LISTS = ("choices", "scores", "data", "results")  # in bodies, what answers a request


def table(results: str | Path | Sequence[Any], form: str = "numpy") -> Any:
    """Table of results.

    For a file, a row is a completion, a score or an embedding, with its request's `custom_id` and its own `index`, or a
    request's `error`. For results of `LLM`, a row is one result or sample; `prompt` is the index of the prompt, `index`
    that of the sample. Missing values are None.

    Args:
        results: a file of results, or a list from `generate` or `score`.
        form: "numpy" for a dict of arrays, "pandas" for a DataFrame, "arrow" for a `pyarrow.Table`.

    Raises:
        BatchError: the file has no results, pandas or pyarrow is not installed, or a column mixes values that an Arrow
            table cannot hold.
        InvalidRequestError: `form` is unknown.
    """
    if form not in ("numpy", "pandas", "arrow"):
        raise InvalidRequestError(f"form {form!r}: expected 'numpy', 'pandas' or 'arrow'")
    rows = list(_rows_of_file(Path(results)) if isinstance(results, str | Path) else _rows(results))
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    if form == "arrow":
        return _arrow(columns)
    arrays = {name: _column(values) for name, values in columns.items()}
    return arrays if form == "numpy" else _import("pandas").DataFrame(arrays)


def _arrow(columns: dict[str, list[Any]]) -> Any:
    arrow = _import("pyarrow")

    def array(name: str, values: list[Any]) -> Any:
        try:
            return arrow.array(values)
        except OverflowError:  # seeds have 64 bits, and no sign
            return arrow.array(values, arrow.uint64())
        except arrow.ArrowException as error:
            raise BatchError(f"column {name!r}: {error}") from error

    return arrow.table({name: array(name, values) for name, values in columns.items()})


def _import(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise BatchError(f"{module} is not installed: pip install {module}") from error


def _rows(results: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for place, result in enumerate(results):
        if not is_dataclass(result) or isinstance(result, type):
            raise InvalidRequestError(f"found {type(result).__name__}; expected results of generate or score")
        if not isinstance(result, Result):
            yield asdict(result)
            continue
        for i, sample in enumerate((result, *result.others)):
            row = asdict(replace(sample, others=()))
            del row["others"]
            yield {"prompt": place, "index": i, **row}


def _rows_of_file(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                yield from _rows_of_line(json.loads(line), f"{path}, line {number}")
    except (OSError, ValueError) as error:
        raise BatchError(f"{path}: found no results: {error}") from error


def _rows_of_line(record: Any, where: str) -> Iterator[dict[str, Any]]:
    if not isinstance(record, dict) or not {"custom_id", "response", "error"} <= set(record):
        raise BatchError(f"{where}: found no result")
    if record["error"] is not None:
        yield {"custom_id": record["custom_id"], "index": 0, "error": record["error"]["message"]}
        return
    body = record["response"]["body"]
    (answers,) = (body[name] for name in _LISTS if name in body)
    for i, found in enumerate(answers):
        message = found.pop("message", {})
        said = {"text": message.pop("content")} if message else {}
        row = {"custom_id": record["custom_id"], "index": i, "error": None, **said, **found, **message}
        yield {name: value for name, value in row.items() if name not in ("object", "role")}


def _column(values: list[Any]) -> np.ndarray:
    """Array of a column: numeric or bool if all values are, else of objects."""
    if values and all(type(value) is type(values[0]) for value in values) and isinstance(values[0], int | float):
        return np.array(values, np.uint64 if isinstance(values[0], int) and max(values) >= 1 << 63 else None)
    column = np.empty(len(values), object)
    column[:] = values
    return column
