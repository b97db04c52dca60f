"""`LLM`: a model and its engine behind the few calls that a notebook needs."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from oxjax.assets import embedded_model
from oxjax.cache.allocator import NULL_PAGE
from oxjax.chat.chats import Chats
from oxjax.embeddings import Embeddings
from oxjax.engine.beams import BeamParams
from oxjax.engine.config import MAX_STEPS, EngineConfig
from oxjax.engine.engine import Engine
from oxjax.engine.metrics import Metrics
from oxjax.engine.output import Chunk
from oxjax.engine.rank import score
from oxjax.engine.request import Generation, Request, reporter, results_or_raise
from oxjax.engine.snapshot import save
from oxjax.errors import (
    CacheError,
    EngineClosedError,
    InvalidRequestError,
    RequestError,
    UnsupportedArchitectureError,
)
from oxjax.evaluate.scoring import Scores
from oxjax.hub import resolve
from oxjax.machine import enable_compilation_cache, pool_bytes, use_threads
from oxjax.models.load import Model, load
from oxjax.models.options import LoadOptions, refuse_keywords
from oxjax.prompts import Prompt, as_list, refusing_texts
from oxjax.results import Result
from oxjax.sampling.params import SamplingParams
from oxjax.tokenizer import Tokenizer

DEFAULT_CONTEXT = 4096
MAX_CHECKPOINTS, CHECKPOINT_SHARE = 1024, 4  # recurrent states kept for reuse, in a quarter of what pages may take


class LLM(Chats, Embeddings, Scores):
    """A model, ready to run.

    A request's tokens and log-probabilities are a function of model file, prompt, sampling parameters and
    seed, to the last bit when `exact`; without it up to rounding, and faster.

    Args:
        model: a GGUF file, any shard of a split one, a directory that holds one model, or
            `hf://org/repo/file.gguf`. None is the small story model that comes with the package.
        exact: bits do not depend on the rest of the batch, on chunking or padding.
        dtype: "float32" or "bfloat16", of activations and pages; None is float32 on CPUs and bfloat16 elsewhere.
        weights: form of the matrices: "auto", "file" (less memory, and faster on CPUs, where products round activations
            to 8 bits), "float32", "bfloat16", "q8_0" or "q4_0"; see `LoadOptions`.
        activations: "int8" or "float32", in native products with quantised weights; see `LoadOptions`.
        backend: "auto", "native" or "xla"; see `LoadOptions`.
        max_context: maximum number of tokens of a prompt and its output together; None is the context that the model
            was trained for, up to 4096.
        max_batch: sequences that run at once, as far as memory for their keys and values goes; others wait.
        max_rows: rows (tokens) of a step; larger ones prefill faster, smaller ones let decoding requests wait less.
        page_size: tokens of a page of keys and values, a divisor of 128.
        steps_per_call: maximum number of decode steps of one call of the device, 1 to 64.
        threads: of the processor that compute; None is all. The first `LLM` of a process decides.
        progress: called with (bytes read, bytes in all) while the model loads.

    Raises:
        GGUFError, ModelError, UnsupportedArchitectureError, TokenizerError: the file cannot be used; see `load`.
        BackendUnavailableError: the native backend was asked for, and cannot run here.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        exact: bool = True,
        dtype: str | None = None,
        weights: str = "auto",
        activations: str = "int8",
        backend: str = "auto",
        max_context: int | None = None,
        max_batch: int = 8,
        max_rows: int = 256,
        page_size: int = 16,
        steps_per_call: int = MAX_STEPS,
        threads: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        **removed: Any,
    ):
        refuse_keywords(removed)
        sizes = {"max_batch": max_batch, "max_rows": max_rows, "max_context": max_context, "threads": threads}
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise InvalidRequestError(f"{name} {value}: expected at least 1")
        # Pages are counted when the engine is made; the other sizes are checked before a model is loaded.
        self._sizes = EngineConfig(1, page_size, max_batch, max(max_rows, max_batch), steps_per_call=steps_per_call)
        if threads is not None:
            use_threads(threads)
        enable_compilation_cache()
        if dtype is None:
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        self.path = Path(embedded_model() if model is None else resolve(model))
        self.model: Model | None = load(
            self.path,
            exact=exact,
            dtype=dtype,
            weights=weights,
            activations=activations,
            backend=backend,
            max_context=max_context,
            progress=progress,
        )
        self.config = self.model.config
        self.tokenizer: Tokenizer = self.model.tokenizer
        self.max_batch, self.max_rows = max_batch, self._sizes.max_rows
        backend = self.config.numerics.backend
        self.options = asdict(LoadOptions(exact, dtype, weights, activations, backend, max_context))
        self.max_context = min(self.config.context_length, DEFAULT_CONTEXT) if max_context is None else max_context

    @cached_property
    def engine(self) -> Engine:
        """The engine; its pages are allocated when it is first needed."""
        if self.model is None:
            raise EngineClosedError("this LLM was closed")
        if not self.config.causal:
            raise UnsupportedArchitectureError(
                f"{self.config.architecture} models encode texts and generate nothing: use embed"
            )
        pages_per_sequence = -(-self.max_context // self._sizes.page_size)
        page, (affordable, memory) = self.config.page_bytes(self._sizes.page_size), pool_bytes()
        if pages_per_sequence * page > memory:
            raise CacheError(
                f"keys and values of {self.max_context} tokens take {pages_per_sequence * page} bytes, and the device "
                f"has {memory}: lower max_context"
            )
        n_pages = pages_per_sequence
        if page:
            n_pages = max(min(self.max_batch * pages_per_sequence, affordable // page), pages_per_sequence)
        slot = self.config.slot_bytes
        sizes = replace(
            self._sizes,
            n_pages=n_pages + NULL_PAGE + 1,
            max_context=self.max_context,
            n_checkpoints=min(MAX_CHECKPOINTS, affordable // (CHECKPOINT_SHARE * slot)) if slot else 0,
        )
        return Engine(self.model, sizes)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Callable[[Metrics], None] | None = None,
        on_result: Callable[[int, Result], None] | None = None,
    ) -> list[Result]:
        """Continue prompts; they run together.

        Args:
            prompts: text, token ids, or a list of either. Text is tokenised with the model's special tokens.
            params: for all prompts, or one per prompt.
            progress: called after every step.
            on_result: called with the place of a prompt and its result as soon as it is there, for those who keep what
                they have; results are returned all the same.

        Returns:
            One result per prompt, in order.

        Raises:
            RequestError: a prompt could not be run. The others were: their results are in the error's
                `results`, and `index` says which prompt it was.
        """
        prompts = as_list(prompts)
        params = _one_each(params, len(prompts))
        seeds = [secrets.randbits(64) if p.seed is None else p.seed for p in params]
        requests = self._run(
            lambda i: self.engine.generate(self._encode(prompts[i]), params[i], seeds[i]),
            len(prompts),
            progress,
            on_result,
        )
        return results_or_raise(requests)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        beams: BeamParams | None = None,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[list[Result]]:
        """The most likely continuations of prompts; see `BeamParams`.

        Args:
            prompts: text, token ids, or a list of either.
            beams: how wide, and what is best.
            params: what may be chosen and when texts end, for all prompts or one per prompt, at temperature 0.

        Returns:
            For each prompt up to `width` results with scores, the best first.

        Raises:
            RequestError: as for `generate`.
        """
        prompts, beams = as_list(prompts), beams or BeamParams()
        params = _one_each(SamplingParams(temperature=0.0) if params is None else params, len(prompts))
        searches = self._run(
            lambda i: self.engine.beam_search(self._encode(prompts[i]), params[i], beams), len(prompts)
        )
        return results_or_raise(searches)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Chunk]:
        """Continue one prompt and yield each token as it comes; abandoning the iterator cancels the request.

        Other calls may run between two tokens; they do not change what comes.

        Args:
            prompt: text or token ids.
            params: how to sample.
            progress: called with (prompt tokens computed, prompt tokens) until the first token is there.

        Raises:
            RequestError: as for `generate`; what was yielded before stands.
        """
        params = SamplingParams() if params is None else params
        return self._stream(self._start(prompt, params), progress)

    def _start(self, prompt: Prompt, params: SamplingParams) -> Generation:
        """Queue the request of a stream."""
        if params.n_samples != 1:
            raise InvalidRequestError(f"{params.n_samples} samples: a stream has one sample; use generate")
        if params.prompt_logprobs is not None:
            raise InvalidRequestError("prompt_logprobs: a stream has none; use generate")
        seed = secrets.randbits(64) if params.seed is None else params.seed
        return self.engine.generate(self._encode(prompt), params, seed)

    def _stream(self, request: Generation, progress: Callable[[int, int], None] | None) -> Iterator[Chunk]:
        sent, n_prompt = 0, len(request.sequence.tokens)
        try:
            while not request.done or sent < len(request.output.chunks):
                if sent == len(request.output.chunks):
                    self.engine.step()
                    if progress is not None and sent == 0:
                        progress(min(request.sequence.n_computed, n_prompt), n_prompt)
                    continue
                yield request.output.chunks[sent]
                sent += 1
            if request.error is not None:
                raise request.error
        finally:
            if not request.done and self.model is not None:
                self.engine.cancel(request)

    def logits(self, prompts: Prompt | Sequence[Prompt]) -> list[Float[np.ndarray, "T vocab"]]:
        """Raw logits at every position of each prompt: float32 `[T, vocab]`, row `t` predicting token `t + 1`.

        Args:
            prompts: text, token ids, or a list of either.

        Raises:
            RequestError: as for `generate`.
        """
        prompts = as_list(prompts)
        requests = self._run(lambda i: self.engine.logits(self._encode(prompts[i])), len(prompts))
        return results_or_raise(requests)

    def snapshot(self, path: str | Path) -> None:
        """Write the requests that are under way to a file, whole or not at all; see `Engine.snapshot`."""
        save(path, self.engine.snapshot())

    def resume(self, path: str | Path) -> list[Result | np.ndarray]:
        """Run the requests of a snapshot to their ends: results, and logits for prompts whose logits were wanted.

        Raises:
            SnapshotError: see `Engine.resume`.
            RequestError: as for `generate`.
        """
        requests = self.engine.resume(Path(path).read_bytes())
        self.engine.run(requests)
        return results_or_raise(requests)

    def warm_up(
        self,
        *,
        logprobs: int = 0,
        prompt_logprobs: int | None = None,
        logits: bool = False,
        embeddings: bool = False,
        named_tokens: int = 0,
        penalty_window: int = 0,
    ) -> None:
        """Compile everything that requests can need, so that none waits for the compiler.

        Args:
            logprobs: also for requests with up to this many `SamplingParams.logprobs`. A beam search needs twice its
                width, and its width more for each token that ends texts but the first.
            prompt_logprobs: also for requests with up to this many `SamplingParams.prompt_logprobs`.
            logits: also for `logits`.
            embeddings: also for `embed` and `rerank`, which are all that an encoder has.
            named_tokens: also for requests whose parameters name this many tokens in biases, bans and the ends that
                `min_tokens` puts off, with those that DRY finds repeating; without it for 16.
            penalty_window: also for penalties that look at up to this many tokens; without it for 64.
        """
        if self.config.causal:
            self.engine.runner.warm_up(
                n_top=logprobs,
                n_edits=named_tokens,
                n_recent=penalty_window,
                all_logits=logits,
                hidden=embeddings,
                n_scored=prompt_logprobs,
            )
        else:
            self.encoder.warm_up()
        if self.config.rank is not None:
            score(self.model.params.rank, [np.zeros(self.config.d_model, np.float32)], self.config)

    def metrics(self) -> Metrics:
        """Counters of the engine since it was made, and how full it is."""
        return self.engine.metrics()

    def close(self) -> None:
        """Let go of parameters and pages. Further calls raise EngineClosedError; closing twice is fine."""
        self.model = None
        engine, encoder = (self.__dict__.pop(name, None) for name in ("engine", "encoder"))
        if engine is not None:
            engine.close()
        if encoder is not None:
            encoder.params = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encode(self, prompt: Prompt, max_length: int | None = None) -> list[int]:
        if isinstance(prompt, str):
            with refusing_texts():
                ids = self.tokenizer.encode(prompt, max_length=max_length)
        else:
            ids = self._ids(prompt)[:max_length]
        if not ids:
            raise InvalidRequestError("the prompt is empty, and the model has no token to begin with")
        return ids

    def _ids(self, prompt: Sequence[int] | Int[np.ndarray, " _"]) -> list[int]:
        try:
            ids, vocab = [index(i) for i in prompt], self.config.vocab_size
        except TypeError:
            raise InvalidRequestError(f"found {prompt!r:.60}; expected a text or token ids") from None
        if wrong := [i for i in ids if not 0 <= i < vocab]:
            raise InvalidRequestError(f"token id {wrong[0]} is outside the vocabulary of {vocab}")
        return ids

    def _run(
        self,
        add: Callable[[int], Request],
        n: int,
        progress: Callable[[Metrics], None] | None = None,
        on_result: Callable[[int, Any], None] | None = None,
    ) -> list[Request | RequestError]:
        """Queue `n` requests, keep the errors of those that are refused, and run the others to their ends.

        Args:
            add: queues request `i`.
            n: number of requests.
            progress: called after every step.
            on_result: called with the index and the result of each request that succeeded, as soon as it is there.
        """
        requests: list[Request | RequestError] = []
        places: dict[Request, int] = {}

        def queue() -> Iterator[Request]:
            for i in range(n):
                try:
                    request = add(i)
                except RequestError as error:
                    requests.append(error)
                else:
                    requests.append(request)
                    places[request] = i
                    yield request

        self.engine.run(queue(), reporter(on_result, places), progress)
        return requests


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, n: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * n
    if len(params) != n:
        raise InvalidRequestError(f"{len(params)} sampling parameters for {n} prompts")
    return list(params)
