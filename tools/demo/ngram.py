"""Unigram and interpolated trigram models: what counting alone achieves on the same tokens."""

from __future__ import annotations

import numpy as np


class NGram:
    """P(c | a, b) = w0/V + w1 P(c) + w2 P(c | b) + w3 P(c | a, b), weights by EM on stories kept from the counts.

    Args:
        train: stories whose n-grams are counted, each an id array that starts and ends with the END id.
        tune: stories that the weights are fitted on.
        vocab: vocabulary size V.
    """

    def __init__(self, train: list[np.ndarray], tune: list[np.ndarray], vocab: int):
        self.vocab = vocab
        keys = self._keys(train)
        self.tables = [np.unique(k, return_counts=True) for k in keys]
        self.weights = np.full(4, 0.25)
        parts = self._parts(tune)
        for _ in range(50):
            share = parts * self.weights
            self.weights = (share / share.sum(1, keepdims=True)).mean(0)

    def _keys(self, stories: list[np.ndarray]) -> list[np.ndarray]:
        """Integer keys of the n-grams (), a, ab, abc -> [(), c, b, bc, ab, abc] at every predicted token."""
        a = np.concatenate([np.r_[ids[:1], ids[:-2]] for ids in stories]).astype(np.int64)
        b = np.concatenate([ids[:-1] for ids in stories]).astype(np.int64)
        c = np.concatenate([ids[1:] for ids in stories]).astype(np.int64)
        v = self.vocab
        return [0 * c, c, b, b * v + c, a * v + b, (a * v + b) * v + c]

    def _parts(self, stories: list[np.ndarray]) -> np.ndarray:
        """[token, 4]: the uniform, unigram, bigram and trigram probability of every predicted token."""
        counts = []
        for (known, n), key in zip(self.tables, self._keys(stories), strict=True):
            at = np.minimum(np.searchsorted(known, key), len(known) - 1)
            counts.append(np.where(known[at] == key, n[at], 0))
        total, c, b, bc, ab, abc = counts
        ratios = [c / total, bc / np.maximum(b, 1), abc / np.maximum(ab, 1)]
        return np.stack([np.full(len(c), 1 / self.vocab), *ratios], 1)

    def losses(self, stories: list[np.ndarray]) -> tuple[float, float]:
        """(unigram, trigram) mean nats per token; the unigram leaves 1e-6 for tokens never seen."""
        parts = self._parts(stories)
        unigram = (1 - 1e-6) * parts[:, 1] + 1e-6 * parts[:, 0]
        return float(-np.log(unigram).mean()), float(-np.log(parts @ self.weights).mean())
