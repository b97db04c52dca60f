"""Beam search over one prompt: which beginnings go on, and when no better end can come. Host only.

The definition is that of transformers (`GenerationMixin._beam_search`), with groups as in Vijayakumar et al. 2016
(https://arxiv.org/abs/1610.02424).
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from oxjax.engine.active import ActiveRequests
from oxjax.engine.output import Output
from oxjax.engine.request import Generation, Request, SampledToken, result_of_output
from oxjax.engine.scheduler import Sequence
from oxjax.errors import InvalidRequestError, NothingLeftError, RequestError
from oxjax.results import Result, raise_first
from oxjax.sampling.pipeline import NOTHING_LEFT


@dataclass(frozen=True)
class BeamParams:
    """Parameters of a beam search.

    Attributes:
        width: how many beginnings go on at every step, and how many texts are found; 1 is greedy.
        length_penalty: texts are compared by the sum of their log-probabilities over their length to this power: above
            0 it favours long ones, below short ones.
        early_stopping: end as soon as there are `width` texts, instead of when no better one can come.
        n_groups: parts of the width that search one after the other, each kept from repeating those before it.
        diversity_penalty: what a token loses for each beam of an earlier group that chose it at the same step.
    """

    width: int = 4
    length_penalty: float = 1.0
    early_stopping: bool = False
    n_groups: int = 1
    diversity_penalty: float = 0.0

    def __post_init__(self) -> None:
        for name in ("width", "n_groups"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InvalidRequestError(f"{name} {value!r}: expected a whole number from 1")
        if self.width % self.n_groups:
            raise InvalidRequestError(f"a width of {self.width} for {self.n_groups} groups: expected a multiple")
        for name, least in (("length_penalty", -math.inf), ("diversity_penalty", 0.0)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not math.isfinite(value) or value < least:
                raise InvalidRequestError(f"{name} {value!r}: expected a finite number, at least {least}")
        if self.diversity_penalty and self.n_groups == 1:
            raise InvalidRequestError("diversity_penalty has no effect without groups")


@dataclass(eq=False)
class Hypothesis(Generation):
    """A partial text of a beam search; instead of sampling a token it offers the most likely ones.

    Attributes:
        search: the beam search it belongs to.
        total: sum of the log-probabilities of its tokens.
        offers: the most likely next tokens and their log-probabilities; None until they are known.
    """

    search: BeamSearch = field(kw_only=True)
    total: float = 0.0
    offers: list[tuple[int, float]] | None = None

    @property
    def is_guided(self) -> bool:
        """The search chooses every token on the host."""
        return True

    def accept(self, sampled: SampledToken) -> bool:
        """Take what may follow; the search says when it is over. Where nothing may, other hypotheses go on."""
        n_top = self.params.logprobs
        if sampled.fault == NOTHING_LEFT and self.error is None:
            self.offers = []
        elif self.error is None and not sampled.fault:
            self.offers = list(zip(sampled.top_tokens[:n_top], sampled.top_logprobs[:n_top], strict=True))
        else:
            super().accept(sampled)
        return False


class Beam(NamedTuple):
    """A text that was found.

    Attributes:
        score: the sum of its log-probabilities over its length to the power of `length_penalty`.
        output: what it consists of.
    """

    score: float
    output: Output


class Growth(NamedTuple):
    """A beginning with one more token."""

    parent: Hypothesis
    token: int
    output: Output
    total: float


@dataclass(eq=False)
class _Group:
    live: list[Hypothesis]
    growths: list[Growth] = field(default_factory=list)
    found: list[Beam] = field(default_factory=list)


class BeamSearch(Request):
    """The beam search of one prompt.

    Args:
        params: its size and scores.
        prompt: token ids.
        n_ends: number of tokens that may end a text.

    Attributes:
        prompt: token ids that its texts continue.
    """

    def __init__(self, params: BeamParams, prompt: list[int], n_ends: int):
        super().__init__()
        self.params = params
        self.prompt = list(prompt)
        self._width = params.width // params.n_groups
        self._n_best = self._width * max(2, 1 + n_ends)
        self._groups: list[_Group] = []

    def start(self, root: Hypothesis) -> None:
        """Begin with the hypothesis that computes the prompt."""
        self._groups = [_Group([root]) for _ in range(self.params.n_groups)]

    @property
    def n_offers(self) -> int:
        """Number of most likely tokens that each hypothesis reports."""
        return self._n_best + (self.params.width - self._width if self.params.diversity_penalty else 0)

    @property
    def live(self) -> list[Hypothesis]:
        """The requests that compute its beginnings, each once."""
        return list(dict.fromkeys(r for group in self._groups for r in group.live))

    @property
    def found(self) -> list[Beam]:
        """The texts so far, the best first."""
        return sorted((b for g in self._groups for b in g.found), key=lambda b: -b.score)

    def result(self) -> list[Result]:
        """Results of the texts found, the best first.

        Raises:
            RequestError: the search failed.
        """
        raise_first([self.error])
        return [dataclasses.replace(result_of_output(self.prompt, b.output, 0), score=b.score) for b in self.found]

    def advance(self, active: ActiveRequests) -> None:
        """Go on if all live hypotheses have offered tokens; those that have wait on the host for the others.

        One that has failed ends the search.

        Args:
            active: requests of the engine; kept up to date.
        """
        scheduler = active.scheduler
        live = self.live
        if error := next((r.error for r in live if r.error is not None), None):
            self.done, self.error = True, error
        elif any(r.offers is None for r in live):
            for request in live:
                if request.offers is not None:
                    scheduler.swap_out(request.sequence)
            return
        growths: dict[Hypothesis, list[Growth]] = {request: [] for request in live}
        try:
            for growth in self._grow_all():
                growths[growth.parent].append(growth)
        except RequestError as error:  # a grammar's
            self.done, self.error = True, error
        _drop([r for r in live if not growths[r]], active)  # before others need their places
        born = {}
        for parent, (first, *others) in ((r, g) for r, g in growths.items() if g):
            for growth in others:
                born[growth] = child = _branch(growth)
                scheduler.fork(parent.sequence, child.sequence)
                active.by_sequence[child.sequence] = child
            parent.sequence.tokens.append(first.token)
            parent.output, parent.total, parent.offers = first.output, first.total, None
            scheduler.requeue(parent.sequence)
            born[first] = parent
        for group in self._groups:
            group.live = [] if self.done else [born[g] for g in group.growths]
        if self.done:
            active.counts["failed" if self.error is not None else "finished"] += 1
            active.complete(self)

    def cancel(self, active: ActiveRequests) -> None:
        """End the search early; for the argument see `advance`."""
        _drop(self.live, active)
        self.done = True
        active.counts["cancelled"] += 1
        active.complete(self)

    def _grow_all(self) -> list[Growth]:
        """Continuations of all hypotheses; empty where the search is over."""
        chosen: Counter[int] = Counter()
        for group in self._groups:
            group.growths = [] if self.done else self._grow(group, chosen)
            chosen.update(g.token for g in group.growths)
        growths = [g for group in self._groups for g in group.growths]
        if not growths and not self.done:
            self.done = True
            if not self.found:
                self.error = NothingLeftError("no token may follow any beginning: all are forbidden")
        return growths

    def _grow(self, group: _Group, chosen: Counter[int]) -> list[Growth]:
        penalty = self.params.diversity_penalty
        offers = (
            (request.total + logprob - penalty * chosen[token], request, token, logprob)
            for request in group.live
            for token, logprob in request.offers
            if logprob > -math.inf
        )
        growths: list[Growth] = []
        # In the order in which they are offered among equals.
        for place, (_, request, token, logprob) in enumerate(heapq.nlargest(self._n_best, offers, key=lambda o: o[0])):
            output = request.output.copy()
            ended = output.push(token, logprob, ()).finish_reason is not None
            total = request.total + logprob
            if not ended and len(growths) < self._width:
                growths.append(Growth(request, token, output, total))
            elif ended and place < self._width:
                group.found.append(Beam(total / len(output.chunks) ** self.params.length_penalty, output))
        group.found = heapq.nlargest(self._width, group.found, key=lambda b: b.score)
        return growths if growths and not self._is_over(group, growths) else []

    def _is_over(self, group: _Group, growths: list[Growth]) -> bool:
        """No text that these hypotheses grow to can be better than the worst that was found."""
        if len(group.found) < self._width:
            return False
        if self.params.early_stopping or self.params.width == 1:  # which is greedy
            return True
        output = growths[0].output
        # A total only falls, and is divided by most where the text is longest, or shortest if that is a reward.
        length = output.max_new if self.params.length_penalty > 0.0 else len(output.chunks) + 1
        best = max(g.total for g in growths) / length**self.params.length_penalty
        return best <= group.found[-1].score


def _drop(live: list[Hypothesis], active: ActiveRequests) -> None:
    for request in live:
        active.scheduler.remove(request.sequence)
        del active.by_sequence[request.sequence]
        request.done = True


def _branch(growth: Growth) -> Hypothesis:
    """Another hypothesis, which shares all but its last token with its parent."""
    parent = growth.parent
    sequence = Sequence(
        [*parent.sequence.tokens, growth.token],
        max_length=parent.sequence.max_length,
        priority=parent.sequence.priority,
    )
    return Hypothesis(
        sequence,
        parent.params,
        0,
        growth.output,
        parent.metadata,
        search=parent.search,
        owner=parent.search,
        total=growth.total,
    )
