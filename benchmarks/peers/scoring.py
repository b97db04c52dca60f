"""What every engine does with logits to score a text, where it gives no log-probabilities itself."""

import numpy as np

Item = tuple[list[int], list[list[int]]]  # a context, and continuations of it


def of_targets(logits: np.ndarray, targets: list[int]) -> np.ndarray:
    """Log-probability of a token for each row, float32 [n], from logits [n, vocab]."""
    highest = logits.max(axis=1)
    chosen = logits[np.arange(len(logits)), targets]
    # A row at a time, so that no second array of this size is made.
    sums = np.array([np.exp(row - top).sum() for row, top in zip(logits, highest, strict=True)])
    return chosen - highest - np.log(sums)


def log_probabilities(logits: np.ndarray, ids: list[int]) -> np.ndarray:
    """Log-probability of every token but the first, float32 [T - 1], from logits [T, vocab]."""
    return of_targets(logits[:-1], ids[1:])
