"""Batch runs: all requests of a file, with results that an interrupted run keeps and a later one completes."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax

from oxjax.engine.encoder import MAX_TEXTS
from oxjax.engine.metrics import Metrics
from oxjax.engine.request import Request
from oxjax.errors import BatchError, EngineClosedError, InvalidRequestError, OxjaxError
from oxjax.evaluate.journal import Journal
from oxjax.evaluate.manifest import Manifest, day_of, facts
from oxjax.evaluate.prepare import PreparedRequest, RequestPreparer
from oxjax.evaluate.request_format import read_id, read_line
from oxjax.evaluate.source import Line, Source
from oxjax.llm import LLM

logger = logging.getLogger(__name__)

WINDOW = 1024  # requests that are sorted by length together
_OK = b'"error": null}\n'  # end of the line of a request that did not fail


@dataclass(frozen=True)
class Progress:
    """Progress of a run.

    Attributes:
        done: number of requests with a result, earlier runs included; `failed` of them have an error.
        total: number of requests.
        metrics: of the engine; None for encoders, and where several engines run.
    """

    done: int
    failed: int
    total: int
    metrics: Metrics | None


@dataclass(frozen=True)
class Summary:
    """Summary of a run.

    Attributes:
        total, done, failed: numbers of requests, as in `Progress`.
        found: number of results of earlier runs.
        seconds: duration of this run.
    """

    total: int
    done: int
    failed: int
    found: int
    seconds: float

    @property
    def complete(self) -> bool:
        """True if all requests have a result."""
        return self.done == self.total


class Answer(NamedTuple):
    """A line of the output.

    Attributes:
        place: index of its request.
        line: the line, newline included.
        error: error of the request, with the number of its line; None if it succeeded.
    """

    place: int
    line: bytes
    error: str | None


Steps = Generator[list[Answer], None, None]  # the answers of each step


def run(
    llm: LLM,
    source: str | Path,
    output: str | Path,
    *,
    seed: int = 0,
    date: str | None = None,
    shard: tuple[int, int] = (1, 1),
    on_error: str = "continue",
    progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Run the requests of a file, or those that an earlier run has left.

    Results are lines of `output` in the order of the requests, in the format of OpenAI's batch API; a result in the
    file is never computed again. In exact mode the file is the same to the byte for any number of interruptions and
    any `max_batch`. On SIGINT and SIGTERM it stops between two steps; a second one interrupts as usual.

    Args:
        llm: runs them.
        source: JSON lines; see `oxjax.evaluate.request_format`.
        output: JSON lines. Beside it come a manifest (see `Manifest`) and, while it runs, a journal.
        seed: requests without a seed get one from this and from their ids.
        date: YYYY-MM-DD, today's date for chat templates; None is that of the manifest, or today if there is none.
        shard: (i, n) runs the i-th of n parts of the requests, by their ids.
        on_error: "continue" writes a line with the error of a request, and goes on; "stop" stops at the first error,
            invalid requests before any of their window run. To continue with another input, name another output.
        progress: called after every step.

    Raises:
        BatchError: the output belongs to another run or cannot be written, or a request failed and `on_error` is
            "stop". Earlier results stay, and so do those of requests that finished before the error.
        InvalidRequestError: `date` is not a date.
    """
    output, requests = Path(output), Source(Path(source), shard)
    date = day_of(output) if date is None else date
    manifest = Manifest.of(facts(llm), llm.path, requests, output, seed=seed, date=date, shard=shard)

    def metrics() -> Metrics | None:
        return llm.metrics() if llm.config.causal else None

    def found(lines: Iterator[Line]) -> Steps:
        return answer(llm, lines, seed, date)

    return record(requests, output, manifest, found, on_error=on_error, progress=progress, metrics=metrics)


def record(
    requests: Source,
    output: Path,
    manifest: Manifest,
    answers_to: Callable[[Iterator[Line]], Steps],
    *,
    on_error: str,
    progress: Callable[[Progress], None] | None,
    metrics: Callable[[], Metrics | None] = lambda: None,
) -> Summary:
    """Write the answers that are missing in an output.

    Args:
        requests: all of the run.
        output, on_error, progress: see `run`.
        manifest: of the output.
        answers_to: answers of requests, in any order. It is closed when the run stops.
        metrics: for `progress`.

    Raises:
        BatchError: see `run`.
    """
    if on_error not in ("continue", "stop"):
        raise BatchError(f"on_error {on_error!r}: expected 'continue' or 'stop'")
    began, source = time.monotonic(), requests.path
    manifest.check(output)
    with Journal(output, manifest.run) as journal, _interrupts() as interrupted:
        manifest.write(output)
        if journal.n_written > len(requests) or any(place >= len(requests) for place in journal.waiting):
            raise BatchError(f"{output}: it has more results than {source} has requests")
        failed = _count_failed(output, journal)
        found = done = journal.n_written + len(journal.waiting)
        places = (place for place in range(len(requests)) if not journal.is_known(place))
        with closing(answers_to(requests.lines(places))) as steps:
            for answers in steps:
                wrong = [a.error for a in answers if a.error is not None]
                if wrong and on_error == "stop":
                    journal.add((a.place, a.line) for a in answers if a.error is None)
                    raise BatchError(f"{source}, {wrong[0]}")
                journal.add((a.place, a.line) for a in answers)
                done, failed = done + len(answers), failed + len(wrong)
                if progress is not None:
                    progress(Progress(done, failed, len(requests), metrics()))
                if interrupted():
                    break
        summary = Summary(len(requests), done, failed, found, time.monotonic() - began)
    if summary.complete:
        replace(manifest, failed=failed).write(output)
    return summary


def answer(llm: LLM, lines: Iterable[Line], seed: int, date: str) -> Steps:
    """Run requests, the longest of a window first; yields the answers of each step.

    Closing the iterator cancels the requests in progress.
    """
    if llm.config.causal:
        llm.engine  # noqa: B018  (an error while it is made is not the fault of a request)
    work, lines = _Work(llm, RequestPreparer(llm, seed, date)), iter(lines)
    ready: deque[tuple[Line, PreparedRequest]] = deque()
    try:
        while True:
            answers: list[Answer] = []
            while work.has_room:
                if not ready:
                    window, wrong = work.prepare(list(islice(lines, WINDOW)))
                    ready += window
                    answers += wrong
                if not ready:
                    break
                answers += work.start(*ready.popleft())
            if not answers:  # report invalid lines before computing, so that on_error="stop" wastes no work
                answers = work.step()
            if not answers and work.is_idle and not ready:
                return
            yield answers
    finally:
        work.cancel()


class _Work:
    """Requests in progress.

    Args:
        llm: runs them.
        preparer: of the run.
    """

    def __init__(self, llm: LLM, preparer: RequestPreparer):
        self.llm, self.preparer = llm, preparer
        self.running: dict[int, tuple[Line, PreparedRequest, list[Request]]] = {}  # by place
        self._ended: deque[int] = deque()  # places of lines all of whose requests are done
        self.texts: list[tuple[Line, PreparedRequest]] = []  # for an encoder, which has no engine

    def prepare(self, lines: list[Line]) -> tuple[list[tuple[Line, PreparedRequest]], list[Answer]]:
        """Prepare the requests of lines: the longest first, and the answers to invalid ones."""
        valid, invalid = [], []
        for line in lines:
            prepared = _attempt(line, partial(self._prepare, line))
            if isinstance(prepared, Answer):
                invalid.append(prepared)
            else:
                valid.append((line, prepared))
        return sorted(valid, key=lambda item: -item[1].n_tokens), invalid

    def _prepare(self, line: Line) -> PreparedRequest:
        request = read_line(line.text)
        if line.repeats:
            raise InvalidRequestError(f"custom_id {request.custom_id!r}: an earlier line has it")
        return self.preparer.prepare(request)

    @property
    def has_room(self) -> bool:
        """True if the next step has room for more work."""
        if not self.llm.config.causal:
            return len(self.texts) < MAX_TEXTS
        return self.llm.engine.scheduler.n_waiting < self.llm.max_batch

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.texts

    def start(self, line: Line, prepared: PreparedRequest) -> list[Answer]:
        """Start a request; returns its answer if it fails at once."""
        if prepared.texts:
            self.texts.append((line, prepared))
            return []
        found = _attempt(line, prepared.start)
        if isinstance(found, Answer):
            return [found]
        self.running[line.place] = line, prepared, found
        n_left = len(found)

        def ended(_: Request) -> None:
            nonlocal n_left
            n_left -= 1
            if not n_left:
                self._ended.append(line.place)

        for request in found:
            request.on_done = ended
        return []

    def step(self) -> list[Answer]:
        """Run one step of the engine, or a batch of texts of an encoder; returns the finished answers."""
        answers = []
        if self.running:
            self.llm.engine.step()
            while self._ended:
                answers.append(self._finish(*self.running.pop(self._ended.popleft())))
        if self.texts:
            hidden = self.llm.encoder.run([ids for _, prepared in self.texts for ids in prepared.texts])
            answers += [self._finish(line, p, [next(hidden) for _ in p.texts]) for line, p in self.texts]
            self.texts = []
        return answers

    @staticmethod
    def _finish(line: Line, prepared: PreparedRequest, found: list[Any]) -> Answer:
        return _attempt(line, lambda: _success(line, prepared.finish(found)))

    def cancel(self) -> None:
        if self.running:  # else there may be no engine
            self.llm.engine.cancel_all(request for _, _, requests in self.running.values() for request in requests)


def _attempt(line: Line, work: Callable[[], Any]) -> Any:
    """Result of work on one request, or an answer with its error.

    No request may end the run, because a resumed run would fail on it again. So an internal error becomes the answer to
    the request that caused it, and is logged.
    """
    try:
        return work()
    except (EngineClosedError, MemoryError, jax.errors.JaxRuntimeError):  # of the machine, not of the request
        raise
    except OxjaxError as error:
        return _failure(line, error)
    except Exception as error:
        logger.exception("line %s: an error of oxjax", line.number)
        return _failure(line, error)


def _success(line: Line, body: dict[str, Any]) -> Answer:
    custom_id = read_id(line.text)
    name = blake2b(custom_id.encode(), digest_size=12).hexdigest()
    response = {"status_code": 200, "request_id": f"req_{name}", "body": body}
    return _answer(line, {"id": f"batch_req_{name}", "custom_id": custom_id, "response": response, "error": None})


def _failure(line: Line, error: Exception) -> Answer:
    try:
        custom_id = read_id(line.text)
    except InvalidRequestError:
        custom_id = None
    found = {"code": type(error).__name__, "message": str(error), "line": line.number}
    record = {"id": None, "custom_id": custom_id, "response": None, "error": found}
    return _answer(line, record, f"line {line.number}: {error}")


def _answer(line: Line, record: dict[str, Any], error: str | None = None) -> Answer:
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    return Answer(line.place, text.encode("utf-8", "backslashreplace") + b"\n", error)


def _count_failed(output: Path, journal: Journal) -> int:
    with output.open("rb") as lines:
        return sum(not line.endswith(_OK) for line in lines) + sum(
            not line.endswith(_OK) for line in journal.waiting.values()
        )


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Function that returns True after SIGINT or SIGTERM; always False outside of the main thread."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def handle(number: int, _: FrameType | None) -> None:
        caught.append(number)
        signal.signal(number, before[number])  # the second one acts as usual

    before: dict[int, Any] = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
