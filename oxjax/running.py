"""The requests of one call: run to their ends, and told of as they end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from oxjax.engine.beams import BeamSearch
from oxjax.engine.engine import Engine
from oxjax.engine.metrics import Metrics
from oxjax.engine.request import Request
from oxjax.errors import RequestError
from oxjax.results import all_or_raise

Queued = Request | BeamSearch | RequestError


@contextmanager
def until_done(
    engine: Engine,
    requests: list[Queued],
    progress: Callable[[Metrics], None] | None = None,
    done: Callable[[int], None] | None = None,
) -> Iterator[None]:
    """Run to their ends the requests that are queued inside; if that is cut short anywhere, none stays.

    Args:
        engine: where they are queued.
        requests: that are queued inside, or why they are not.
        progress: called after every step.
        done: called with the place of each request that ended, however it did.
    """
    try:
        yield
        pending = deque(i for i, r in enumerate(requests) if not isinstance(r, RequestError))
        while pending:
            # They run in order, so those that have ended are near the beginning.
            front = [pending.popleft() for _ in range(min(len(pending), 4 * engine.scheduler.max_batch))]
            ended = {i for i in front if all(part.done for part in requests[i].parts)}
            pending.extendleft(i for i in reversed(front) if i not in ended)
            if done is not None:
                for i in sorted(ended):
                    done(i)
            if ended:
                continue
            engine.step()
            if progress is not None:
                progress(engine.metrics())
    finally:
        for part in (part for r in requests if not isinstance(r, RequestError) for part in r.parts):
            engine.cancel(part)


def reporting(
    on_result: Callable[[int, Any], None] | None, value: Callable[[Any], Any]
) -> Callable[[int, Queued], None] | None:
    """What tells somebody of each request's value when it is done, and says nothing of those that failed."""
    if on_result is None:
        return None

    def done(place: int, request: Queued) -> None:
        try:
            (found,) = all_or_raise([request], value)
        except RequestError:
            return
        on_result(place, found)

    return done
