"""What every engine does with logits to score a text, where it gives no log-probabilities itself."""

import numpy as np


def log_probabilities(logits: np.ndarray, ids: list[int]) -> np.ndarray:
    """Log-probability of every token but the first, float32 [T - 1], from logits [T, vocab]."""
    rows = logits[:-1]
    highest = rows.max(axis=1)
    chosen = rows[np.arange(len(rows)), ids[1:]]
    # A row at a time, so that no second array of this size is made.
    sums = np.array([np.exp(row - top).sum() for row, top in zip(rows, highest, strict=True)])
    return chosen - highest - np.log(sums)
