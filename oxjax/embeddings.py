"""Embeddings and reranking: the part of `LLM` that turns texts to vectors and scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from oxjax.config import ModelConfig
from oxjax.engine.encoder import Encoder
from oxjax.engine.engine import Engine
from oxjax.engine.pooling import check_pooling, pool
from oxjax.engine.rank import PairEncoder, read_rerank_template, score
from oxjax.engine.request import or_raise, outcome
from oxjax.errors import EngineClosedError, InvalidRequestError, RequestError
from oxjax.models.load import Model
from oxjax.prompts import Prompt, as_list, refusing_texts
from oxjax.tokenizer import Tokenizer

MAX_HIDDEN = 64  # texts whose hidden states are kept at a time


class Embeddings:
    """The part of `LLM` that embeds and reranks."""

    model: Model | None
    config: ModelConfig
    tokenizer: Tokenizer
    path: Path
    max_rows: int
    max_context: int
    engine: cached_property[Engine]
    _encode: Callable[..., list[int]]
    _ids: Callable[[Any], list[int]]
    _run: Callable[..., list[Any]]

    @cached_property
    def encoder(self) -> Encoder:
        """The runner of an encoder model; it is made when it is first needed."""
        if self.model is None:
            raise EngineClosedError("this LLM was closed")
        return Encoder(self.config, self.model.params, max_rows=self.max_rows, max_context=self.max_context)

    def embed(
        self,
        texts: Prompt | Sequence[Prompt],
        pooling: str | None = None,
        normalize: bool = True,
        *,
        truncate: int | None = None,
    ) -> Float[np.ndarray, "n d_model"] | list[Float[np.ndarray, "T d_model"]]:
        """Embeddings of texts, from the hidden states after the model's last norm. Any model has them.

        Args:
            texts: text, token ids, or a list of either. Text is tokenised with the model's special tokens, of which
                an empty one consists.
            pooling: "mean", "max", "cls" (the first token), "last", or "none" for a vector per token, special tokens
                included. None takes what the file says, else "mean" for encoders and "last" for causal models.
            normalize: divide every vector by its length.
            truncate: keep no more than so many tokens of a text, the first ones and those that the tokenizer adds
                after it; of ids the first ones. None refuses texts that are longer than `max_context`.

        Returns:
            float32 `[n, d_model]`, a row per text in order; with pooling "none" a list of `[T, d_model]`.

        Raises:
            InvalidRequestError: there is no such pooling, or `truncate` leaves nothing or too much.
            RequestError: as for `generate`.
        """
        pooling = self.config.pooling if pooling is None else pooling
        check_pooling(pooling)
        self._check_truncate(truncate)
        prompts = as_list(texts)
        vectors = or_raise(self._pooled(prompts, lambda p: self._encode(p, truncate), pooling, normalize=normalize))
        if pooling == "none":
            return vectors
        return np.stack(vectors) if vectors else np.zeros((0, self.config.d_model), np.float32)

    def _check_truncate(self, truncate: int | None) -> None:
        least = max(1, self.tokenizer.n_special)
        if truncate is not None and not least <= truncate <= self.max_context:
            raise InvalidRequestError(
                f"truncate {truncate}: expected {least}, for the special tokens, to {self.max_context}, the context"
            )

    def rerank(self, query: Prompt, documents: Prompt | Sequence[Prompt]) -> Float[np.ndarray, " n"]:
        """Score how well each document answers a query, by the head of a reranker (`cls.*` tensors).

        Each document is read together with the query, in the file's `rerank` template or with the special tokens of
        its vocabulary between them, as llama.cpp does. Control tokens that a text spells are read as text.

        Args:
            query: text or token ids.
            documents: text, token ids, or a list of either; ids are without special tokens.

        Returns:
            float32 `[n]`, a score per document in order, higher for better ones: the first of the head's labels, as it
            comes out of the head.

        Raises:
            InvalidRequestError: the model has no such head.
            RequestError: as for `generate`.
        """
        self._check_rank()
        encode = partial(self._encode_document, query)
        found = self._pooled(as_list(documents), encode, self.config.rank.pooling, normalize=False)
        scores = iter(self._rank([row for row in found if not isinstance(row, RequestError)]))
        return np.array(or_raise([row if isinstance(row, RequestError) else next(scores) for row in found]), np.float32)

    def _check_rank(self) -> None:
        if self.config.rank is None:
            raise InvalidRequestError("the model has no head that ranks (cls.*): compare embeddings instead")

    def _encode_document(self, query: Prompt, document: Prompt) -> list[int]:
        """Ids of both, as a model with a head reads them."""
        with refusing_texts():
            return self._pairs.encode(*(p if isinstance(p, str) else self._ids(p) for p in (query, document)))

    def _rank(self, rows: list[np.ndarray]) -> list[np.floating]:
        """Scores of pooled hidden states."""
        return [labels[0] for labels in score(self.model.params.rank, rows, self.config)]

    @cached_property
    def _pairs(self) -> PairEncoder:
        return PairEncoder(self.tokenizer, read_rerank_template(self.path))

    def _pooled(
        self, prompts: list[Prompt], encode: Callable[[Prompt], list[int]], pooling: str, *, normalize: bool
    ) -> list[np.ndarray | RequestError]:
        """Pooled hidden states of each prompt, or the error that there are none."""
        found: list[np.ndarray | RequestError] = []
        for start in range(0, len(prompts), MAX_HIDDEN):
            for rows in self._hidden_states(prompts[start : start + MAX_HIDDEN], encode):
                try:
                    found.append(rows if isinstance(rows, RequestError) else pool(rows, pooling, normalize=normalize))
                except RequestError as error:
                    found.append(error)
        return found

    def _hidden_states(
        self, prompts: list[Prompt], encode: Callable[[Prompt], list[int]]
    ) -> list[np.ndarray | RequestError]:
        """Float32 `[T, d_model]` of each prompt, or why there is none."""
        if self.config.causal:
            requests = self._run(lambda i: self.engine.hidden(encode(prompts[i])), len(prompts))
            return [outcome(request) for request in requests]
        found: list[Any] = []
        for prompt in prompts:
            try:
                ids = encode(prompt)
                self.encoder.check(ids)
                found.append(ids)
            except RequestError as error:
                found.append(error)
        hidden = self.encoder.run([ids for ids in found if isinstance(ids, list)])
        return [next(hidden) if isinstance(ids, list) else ids for ids in found]
