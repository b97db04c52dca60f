"""oxjax, through its engine: what `LLM` runs, with room for every sequence that a measurement has."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax

from benchmarks import trace
from benchmarks.peers import spare_tokens
from benchmarks.peers.scoring import Item
from oxjax import LLM, SamplingParams
from oxjax.config import MoESpec
from oxjax.engine.config import EngineConfig
from oxjax.engine.engine import Engine as Loop
from oxjax.engine.request import Request
from oxjax.kernels.quantized import QuantizedTensor

PAGE_SIZE = 16
_ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


class Engine:
    """A model and an engine that holds all that is asked of it.

    Args:
        model: a GGUF file.
        threads: that this process has been given; XLA starts as many.
        exact: see `LLM`.
        weights: see `LLM`.
        shapes: (sequences, tokens of each) that there must be room for.
    """

    def __init__(self, model: str, threads: int, *, exact: bool, weights: str, shapes: list[tuple[int, int]]):
        sequences, context = max(n for n, _ in shapes), max(length for _, length in shapes)
        llm = LLM(model, exact=exact, weights=weights, max_batch=sequences, max_context=context)
        self.params, self.config = llm.model.params, llm.config
        # `LLM` would size the pool by the memory there is; others are given all the room that they ask for.
        n_pages = 1 + max(n * -(-length // PAGE_SIZE) for n, length in shapes)
        config = EngineConfig(n_pages, PAGE_SIZE, sequences, max(256, sequences), context)
        self.engine = Loop(llm.model, config)
        self._tracing: Callable[[], AbstractContextManager] = nullcontext

    def first_token(self, prompts: list[list[int]], _: dict[str, Any]) -> None:
        self._finish([self.engine.generate(prompts[0], _ONE_TOKEN, 0)])

    def prefill(self, prompts: list[list[int]], _: int, __: dict[str, Any]) -> tuple[float, int]:
        """Seconds until the token after a prompt, and the prompt's tokens."""
        (prompt,) = prompts

        def run() -> None:
            self._finish([self.engine.generate(prompt, _ONE_TOKEN, 0)])

        return self._timed(run), len(prompt)

    def decode(self, prompts: list[list[int]], n_new: int, _: dict[str, Any]) -> tuple[float, int]:
        """Seconds for tokens after prompts, and how many they are, in all sequences together."""
        n, engine = len(prompts), self.engine
        # First all prompts are computed, then found again: so the sequences begin to decode together.
        self._finish([engine.generate(prompt, _ONE_TOKEN, 0) for prompt in prompts])
        params = SamplingParams(max_tokens=n_new + spare_tokens(n), temperature=0.0, ignore_eos=True)
        requests = [engine.generate(prompt, params, 0) for prompt in prompts]
        while any(len(r.output.chunks) < 2 for r in requests):
            engine.step()
        before = engine.metrics()

        def run() -> None:
            while engine.metrics().generated_tokens - before.generated_tokens < n * n_new:
                engine.step()

        seconds, after = self._timed(run), engine.metrics()
        alone = any(r.done for r in requests) or after.preemptions != before.preemptions or after.running != n
        for request in requests:
            engine.cancel(request)
        if alone:
            raise RuntimeError(f"{n} sequences did not run together all the time")
        return seconds, after.generated_tokens - before.generated_tokens

    def score(self, prompts: list[list[int]], _: int, __: dict[str, Any]) -> tuple[float, int]:
        """Seconds for the log-probabilities of a text's tokens, and how many tokens it has."""
        (text,) = prompts

        return self._timed(lambda: self._finish(self.engine.score(text[:1], [text[1:]]))), len(text)

    def choose(self, items: list[Item], _: dict[str, Any]) -> tuple[float, list[list[float]]]:
        """Seconds for the log-probabilities of continuations after their contexts, and these."""
        found: list[list[Request]] = []

        def run() -> None:
            found.extend(self.engine.score(context, continuations) for context, continuations in items)
            self._finish([request for requests in found for request in requests])

        seconds = self._timed(run)
        return seconds, [[request.result().logprob for request in requests] for requests in found]

    def profile(self, work: str, prompts: list[list[int]], n_new: int) -> dict[str, Any]:
        """Where the time of `prefill`, `decode` or `score` goes; see `trace.summary`."""
        with tempfile.TemporaryDirectory() as folder:
            self._tracing = lambda: trace.tracing(folder)
            try:
                _, tokens = getattr(self, work)(prompts, n_new, {})
            finally:
                self._tracing = nullcontext
            return {**trace.summary(folder), "tokens": tokens}

    def facts(self) -> dict[str, Any]:
        """What the model asks of a machine."""
        params, config = self.params, self.config
        last = params.embedding if params.output is None else params.output
        dense = not any(isinstance(layer.mlp, MoESpec) for layer in config.layers)
        return {
            "cache_bytes": config.page_bytes(1),
            # Of a mixture of experts a step reads and multiplies what its tokens choose.
            "weight_bytes": sum(x.nbytes for x in jax.tree.leaves((params.layers, last))) if dense else None,
            "layer_weights": _matrix_elements(params.layers) if dense else None,
            "output_weights": _matrix_elements(last),
            "integers": any(isinstance(x, QuantizedTensor) for x in _matrices(params.layers)),
        }

    def _finish(self, requests: list[Request]) -> None:
        self.engine.run(requests)
        for request in requests:
            if request.error is not None:
                raise request.error

    def _timed(self, run: Callable[[], None]) -> float:
        with self._tracing():
            start = time.perf_counter()
            run()
            return time.perf_counter() - start


def _matrices(tree: Any) -> list[Any]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, QuantizedTensor))
    return [x for x in leaves if len(x.shape) > 1]


def _matrix_elements(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in _matrices(tree))
