"""`LLM.score` and `LLM.perplexity`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

from oxjax.engine.engine import Engine
from oxjax.engine.metrics import Metrics
from oxjax.engine.request import Scoring, reporter, results_or_raise
from oxjax.errors import InvalidRequestError, RequestError
from oxjax.evaluate.pairs import begin, encode_pair, windows
from oxjax.prompts import refusing_texts
from oxjax.results import Perplexity, Score
from oxjax.tokenizer import Tokenizer

Text = str | Sequence[int]


class Scores:
    """Mixin of `LLM`: log-likelihoods and perplexity of texts."""

    engine: cached_property[Engine]
    tokenizer: Tokenizer
    max_context: int
    _encode: Callable[[Any], list[int]]

    def score(
        self,
        pairs: Iterable[tuple[Text, Text]],
        *,
        progress: Callable[[Metrics], None] | None = None,
        on_result: Callable[[int, Score], None] | None = None,
    ) -> list[Score]:
        """Log-likelihoods of continuations after contexts.

        All run together, and a shared context is computed once. In exact mode the bits of a score do not depend on the
        other pairs or on their order.

        Args:
            pairs: (context, continuation), two texts or two lists of token ids. Texts are encoded together, as
                `oxjax.evaluate.pairs.encode_pair` says; ids are taken as they are.
            progress: called after every step.
            on_result: called with the index of a pair and its score as soon as it is computed.

        Returns:
            One score per pair, in order.

        Raises:
            RequestError: a pair could not be scored; `index` is its index, and the scores of the others are in
                `results`.
        """
        groups: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        found: dict[int, Scoring | RequestError] = {}
        places: dict[Scoring, int] = {}
        for i, pair in enumerate(pairs):
            try:
                context, continuation = self._encode_pair(pair)
                groups.setdefault(tuple(context), []).append((i, continuation))
            except RequestError as error:
                found[i] = error

        def queue() -> Iterator[Scoring]:
            for context, members in groups.items():
                requests = self._score_group(list(context), members)
                found.update(requests)
                queued = {request: i for i, request in requests.items() if isinstance(request, Scoring)}
                places.update(queued)
                yield from queued

        self.engine.run(queue(), reporter(on_result, places), progress)
        return results_or_raise(found[i] for i in range(len(found)))

    def _score_group(
        self, context: list[int], members: list[tuple[int, list[int]]]
    ) -> dict[int, Scoring | RequestError]:
        """Queue the continuations of a context; if one is invalid, the others alone."""
        places, continuations = zip(*members, strict=True)
        try:
            return dict(zip(places, self.engine.score(context, continuations), strict=True))
        except RequestError as error:
            if len(members) == 1:
                return {places[0]: error}
            return {i: found for member in members for i, found in self._score_group(context, [member]).items()}

    def _encode_pair(self, pair: Any) -> tuple[list[int], list[int]]:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InvalidRequestError(f"found {pair!r:.60}; expected a pair (context, continuation)")
        context, continuation = pair
        if isinstance(context, str) != isinstance(continuation, str):
            raise InvalidRequestError("context and continuation: expected two texts or two lists of token ids")
        if isinstance(context, str):
            with refusing_texts():
                return encode_pair(self.tokenizer, context, continuation)
        return self._encode(context), self._encode(continuation)

    def perplexity(
        self,
        text: Text,
        stride: int | None = None,
        *,
        window: int | None = None,
        progress: Callable[[Metrics], None] | None = None,
    ) -> Perplexity:
        """Perplexity of a text of any length, with a sliding window.

        Every token except the first (BOS, if the model has one) is scored once. A text that fits into a window is
        scored in one.

        Args:
            text: text or token ids, which are taken as they are.
            stride: number of tokens that each window after the first scores, after at least `window - stride` others;
                None is half a window. A smaller stride costs more and gives tokens longer contexts.
            window: number of tokens that the model reads at once; None is `max_context`.
            progress: called after every step.

        Raises:
            InvalidRequestError: fewer than two tokens, or an impossible window or stride.
            RequestError: as for `score`.
        """
        if isinstance(text, str):
            with refusing_texts():
                ids = begin(self.tokenizer, text)
        else:
            ids = self._encode(text)
        window = self.max_context if window is None else window
        stride = max(1, window // 2) if stride is None else stride
        if not 1 <= window <= self.max_context or not 1 <= stride <= window:
            raise InvalidRequestError(
                f"window {window}, stride {stride}: expected 1 <= stride <= window <= max_context, {self.max_context}"
            )
        if len(ids) < 2:
            raise InvalidRequestError(f"{len(ids)} tokens: the perplexity of a text needs two, one to score")
        pairs = [(ids[w.start : w.first], ids[w.first : w.end]) for w in windows(len(ids), window, stride)]
        scores = self.score(pairs, progress=progress)
        logprobs = [x for score in scores for x in score.token_logprobs]
        total = math.fsum(logprobs)
        n_bytes = sum(len(self.tokenizer.token_bytes(i)) for i in ids[1:])
        return Perplexity(
            perplexity=math.exp(-total / len(logprobs)),
            bits_per_byte=-total / math.log(2) / n_bytes if n_bytes else math.nan,
            logprob=total,
            token_ids=ids[1:],
            token_logprobs=logprobs,
        )
