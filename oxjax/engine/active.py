"""The requests that are in the engine, and the ends of those that were."""

from __future__ import annotations

from collections import Counter

from oxjax.engine.request import Capture, Generation, Request, Scoring
from oxjax.engine.scheduler import Scheduler, Sequence

SequenceRequest = Generation | Scoring | Capture


class ActiveRequests:
    """Requests by their sequences, and who waits for them.

    Invariant: a request is in `by_sequence` exactly until it is done; the result of an owner is complete when none of
    its parts is in there.

    Args:
        scheduler: of their sequences.

    Attributes:
        counts: of requests that came, finished, failed and were cancelled; the loop adds its own.
    """

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.by_sequence: dict[Sequence, SequenceRequest] = {}
        self.counts: Counter[str] = Counter()
        self._complete: list[Request] = []

    def admit(self, request: SequenceRequest) -> None:
        """Take a request in, whose sequence the scheduler has or will get when its leader's prompt is computed."""
        self.by_sequence[request.sequence] = request
        self.counts["requests"] += 1
        request.done, request.error = False, None
        request.n_open += 1
        if request.owner is not None:
            request.owner.n_open += 1

    def attach(self, part: Request, owner: Request) -> None:
        """Make a request that is here a part of another one's result."""
        part.owner = owner
        owner.n_open += part.n_open

    def leave(self, request: SequenceRequest, how: str | None = None) -> None:
        """Let a request go; the first of those that wait for its prompt computes it instead.

        Args:
            request: one that is here.
            how: "finished", "failed" or "cancelled"; None tells from its error.
        """
        self.scheduler.remove(request.sequence)
        del self.by_sequence[request.sequence]
        request.done = True
        self.counts[how or ("failed" if request.error is not None else "finished")] += 1
        followers = [r for r in request.followers if not r.done]
        request.followers = ()
        if followers:
            first, *others = followers
            first.sequence.reserved_seqs = len(followers)
            self.scheduler.add(first.sequence)
            first.followers = tuple(others)
        for waiting in (request, request.owner):
            if waiting is not None:
                waiting.n_open -= 1
                if not waiting.n_open:
                    self._complete.append(waiting)

    def complete(self, request: Request) -> None:
        """Note that a request of several sequences is over, however many of them were open."""
        request.n_open = 0
        self._complete.append(request)

    def notify(self) -> list[Request]:
        """Hand requests that were completed since the last call to their waiters; returns those on their own."""
        told = []
        while self._complete:  # one at a time: should a waiter raise, the next call goes on with the others
            request = self._complete.pop(0)
            if request.owner is None:
                told.append(request)
            waiter, request.on_done = request.on_done, None
            if waiter is not None:
                waiter(request)
        return told
