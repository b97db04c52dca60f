"""llama.cpp through its Python binding, the low-level part of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.peers.scoring import Item, log_probabilities, of_targets

_UBATCH = 512  # rows that llama.cpp computes at once, its default
_CACHES = {"f32": 0, "f16": 1}  # ggml types
_SPARE = 2  # tokens of a context beyond those that are measured


@llama_cpp.llama_log_callback
def _quiet(*_: object) -> None:
    pass


class Engine:
    """A model, and a context for every measurement.

    Args:
        model: a GGUF file.
        threads: for prompts and for decoding.
    """

    def __init__(self, model: str, threads: int):
        llama_cpp.llama_log_set(_quiet, None)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        self.threads = threads
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def first_token(self, prompts: list[list[int]], settings: dict[str, Any]) -> None:
        with self._context(1, len(prompts[0]), settings) as context:
            context.prompt(prompts[0])

    def prefill(self, prompts: list[list[int]], _: int, settings: dict[str, Any]) -> tuple[float, int]:
        """Seconds until the token after a prompt, and the prompt's tokens."""
        (prompt,) = prompts
        with self._context(1, len(prompt), settings) as context:
            context.warm_up(prompt)
            start = time.perf_counter()
            context.prompt(prompt)
            return time.perf_counter() - start, len(prompt)

    def decode(self, prompts: list[list[int]], n_new: int, settings: dict[str, Any]) -> tuple[float, int]:
        """Seconds for tokens after prompts, and how many they are, in all sequences together.

        Every sequence has keys and values of its own: a copy of the first prompt's, which takes less time than
        computing them; tokens differ from the first decoded one on.
        """
        n, length = len(prompts), len(prompts[0])
        with self._context(n, length + n_new + _SPARE, settings) as context:
            context.prompt(prompts[0])
            context.copy_first(n)
            last = context.step([prompt[0] for prompt in prompts], length)
            start = time.perf_counter()
            for i in range(n_new):
                last = context.step(last, length + 1 + i)
            return time.perf_counter() - start, n * n_new

    def score(self, prompts: list[list[int]], _: int, settings: dict[str, Any]) -> tuple[float, int]:
        """Seconds for the log-probabilities of a text's tokens, and how many tokens it has."""
        (text,) = prompts
        with self._context(1, len(text), settings) as context:
            context.all_logits(text)
            context.clear()
            start = time.perf_counter()
            log_probabilities(context.all_logits(text), text)
            return time.perf_counter() - start, len(text)

    def choose(self, items: list[Item], settings: dict[str, Any]) -> tuple[float, list[list[float]]]:
        """Seconds for the log-probabilities of continuations after their contexts, and these.

        A context is computed once; its continuations share its state, and run as one batch.
        """
        most = max(len(continuations) for _, continuations in items)
        length = max(len(context) + sum(map(len, continuations)) for context, continuations in items)
        with self._context(most, length, settings, unified=True) as context:
            context.warm_up(items[0][0])
            start = time.perf_counter()
            found = [context.choose(*item) for item in items]
            return time.perf_counter() - start, found

    @contextmanager
    def _context(
        self, n_seqs: int, length: int, settings: dict[str, Any], *, unified: bool = False
    ) -> Iterator[_Context]:
        params = llama_cpp.llama_context_default_params()
        per_sequence = -(-length // 256) * 256  # rounded as llama.cpp does
        params.n_ctx = n_seqs * per_sequence
        params.n_batch, params.n_ubatch, params.n_seq_max = max(length, _UBATCH), _UBATCH, n_seqs
        params.n_threads = params.n_threads_batch = self.threads
        params.kv_unified = unified
        params.flash_attn_type = int(settings["flash"])
        params.type_k = params.type_v = _CACHES[settings["cache"]]
        handle = llama_cpp.llama_init_from_model(self.model, params)
        if not handle:
            raise RuntimeError(f"llama.cpp cannot make a context with {settings}")
        batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        try:
            yield _Context(handle, batch, self.vocab)
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(handle)


class _Context:
    def __init__(self, handle: Any, batch: Any, vocab: int):
        self.handle, self.batch, self.vocab = handle, batch, vocab

    def warm_up(self, prompt: list[int]) -> None:
        """Touch the memory that prompts use for the first time."""
        self.prompt(prompt[:_UBATCH])
        self.clear()

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.handle), True)

    def prompt(self, tokens: list[int]) -> int:
        """Compute sequence 0, and choose the token after it."""
        n = len(tokens)
        self._decode(tokens, np.arange(n), [0] * n, np.arange(n) == n - 1)
        return self._greedy(n - 1)

    def all_logits(self, tokens: list[int]) -> np.ndarray:
        """Logits [T, vocab] of sequence 0."""
        n = len(tokens)
        self._decode(tokens, np.arange(n), [0] * n, np.ones(n))
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.handle), (n, self.vocab))

    def copy_first(self, n_seqs: int) -> None:
        """Give sequences 1 and on the state of sequence 0."""
        memory = llama_cpp.llama_get_memory(self.handle)
        for sequence in range(1, n_seqs):
            llama_cpp.llama_memory_seq_cp(memory, 0, sequence, -1, -1)

    def step(self, tokens: list[int], position: int) -> list[int]:
        """Append a token to every sequence, and choose the next ones."""
        n = len(tokens)
        self._decode(tokens, np.full(n, position), range(n), np.ones(n))
        return [self._greedy(row) for row in range(n)]

    def choose(self, context: list[int], continuations: list[list[int]]) -> list[float]:
        """Log-probabilities of continuations of a context."""
        self.clear()
        n = len(context)
        self._decode(context, np.arange(n), [0] * n, np.arange(n) == n - 1)
        last = np.array(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.handle, n - 1), (1, self.vocab)))
        self.copy_first(len(continuations))
        read = [tokens[:-1] for tokens in continuations]  # what follows a last token is not wanted
        tokens = [token for part in read for token in part]
        logits = np.zeros((0, self.vocab), np.float32)
        if tokens:
            positions = np.concatenate([n + np.arange(len(part)) for part in read])
            sequences = [i for i, part in enumerate(read) for _ in part]
            self._decode(tokens, positions, sequences, np.ones(len(tokens)))
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.handle), (len(tokens), self.vocab))
        found, end = [], 0
        for part, targets in zip(read, continuations, strict=True):
            begin, end = end, end + len(part)
            rows = np.concatenate([last, logits[begin:end]])
            found.append(float(of_targets(rows, targets).sum()))
        return found

    def _decode(self, tokens: list[int], positions: np.ndarray, sequences: Any, wanted: np.ndarray) -> None:
        batch, n = self.batch, len(tokens)
        batch.n_tokens = n
        for pointer, values in ((batch.token, tokens), (batch.pos, positions), (batch.logits, wanted)):
            np.ctypeslib.as_array(pointer, (n,))[:] = values
        for i, sequence in enumerate(sequences):
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if status := llama_cpp.llama_decode(self.handle, batch):
            raise RuntimeError(f"llama.cpp: a batch of {n} tokens returned {status}")

    def _greedy(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.handle, row)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())
