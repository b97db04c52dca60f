"""Runs an encoder: packs texts into batches of a few fixed shapes. There is no state, so there is no scheduler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import pairwise

import jax
import numpy as np
from jaxtyping import Float

from oxjax.config import ModelConfig
from oxjax.engine.programs import CountCompilations, row_buckets
from oxjax.errors import RequestTooLargeError
from oxjax.models.encoder import EncoderParams, Texts, encode

MAX_TEXTS = 32  # of a batch

_encode = jax.jit(encode, static_argnames="config")


class Encoder:
    """Hidden states of whole texts. Every shape it uses follows from a row bucket, so shapes are few and known.

    Args:
        config: static.
        params: on the device.
        max_rows: rows of a batch of several texts; a longer text runs alone.
        max_context: tokens of a text.
    """

    def __init__(self, config: ModelConfig, params: EncoderParams, *, max_rows: int, max_context: int):
        self.config, self.params = config, params
        self.max_rows, self.max_context = max_rows, max_context
        self.buckets = row_buckets(max(max_rows, max_context), config.numerics)
        self.compilations: Counter[str] = Counter()

    def check(self, ids: Seq[int]) -> None:
        """Refuse a text that does not fit.

        Raises:
            RequestTooLargeError: it is longer than `max_context`.
        """
        if len(ids) > self.max_context:
            raise RequestTooLargeError(
                f"{len(ids)} tokens, and the context holds {self.max_context}: shorten the text or raise max_context"
            )

    def run(self, texts: Seq[Seq[int]]) -> Iterator[Float[np.ndarray, "_ d_model"]]:
        """Float32 hidden states `[T, d_model]` of each text, in order; texts are as `check` wants them."""
        for part in self._batches(texts):
            cuts = np.cumsum([0, *map(len, part)])
            hidden = self._run_batch(np.concatenate(part), cuts)
            yield from (hidden[start:stop] for start, stop in pairwise(cuts))

    def _batches(self, texts: Seq[Seq[int]]) -> Iterator[Seq[Seq[int]]]:
        start = rows = 0
        for i, ids in enumerate(texts):
            if i > start and (rows + len(ids) > self.max_rows or i - start == MAX_TEXTS):
                yield texts[start:i]
                start, rows = i, 0
            rows += len(ids)
        if start < len(texts):
            yield texts[start:]

    def _run_batch(self, ids: np.ndarray, cuts: np.ndarray) -> Float[np.ndarray, "_ d_model"]:
        bucket = next(b for b in self.buckets if b >= len(ids))
        tokens = np.zeros(bucket, np.int32)
        tokens[: len(ids)] = ids
        cu_lens = np.full(MAX_TEXTS + 1, cuts[-1], np.int32)
        cu_lens[: len(cuts)] = cuts
        with CountCompilations(_encode, f"batch of {bucket} rows", self.compilations):
            hidden = _encode(self.params, Texts(*jax.device_put((tokens, cu_lens))), config=self.config)
        return np.asarray(hidden).astype(np.float32)

    def warm_up(self) -> None:
        """Compile every shape that `run` can meet, on padding."""
        for bucket in self.buckets:
            self._run_batch(np.zeros(bucket, np.int32), np.zeros(1, np.int32))
