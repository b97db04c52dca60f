"""Pooling of the hidden states of a text to its embedding; on the host, text by text."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from oxjax.errors import InvalidRequestError, NonFiniteLogitsError

_POOL = {
    "none": lambda rows: rows,
    "mean": lambda rows: rows.mean(axis=0, dtype=np.float64),
    "max": lambda rows: rows.max(axis=0),
    "cls": lambda rows: rows[0],
    "last": lambda rows: rows[-1],
}


def check_pooling(pooling: str) -> None:
    """Refuse a name that is none of the kinds of pooling.

    Raises:
        InvalidRequestError: it is not one.
    """
    if pooling not in _POOL:
        hint = ", which is for pairs of texts, see rerank" if pooling == "rank" else ""
        raise InvalidRequestError(f"pooling {pooling!r}{hint}: expected one of {', '.join(_POOL)}")


def pool(rows: Float[np.ndarray, "T d_model"], pooling: str, *, normalize: bool) -> Float[np.ndarray, "*T d_model"]:
    """The embedding of a text, float32 `[d_model]`; with pooling "none" one for each token.

    Args:
        rows: its hidden states, float32.
        pooling: "mean" and "max" are taken over all rows, special tokens included, "cls" is the first row, "last" the
            last one.
        normalize: divide every vector by its length; one of zeros stays.

    Raises:
        NonFiniteLogitsError: the hidden states hold NaN or infinity.
    """
    if not np.isfinite(rows).all():
        raise NonFiniteLogitsError("the hidden states hold NaN or infinity")
    vectors = _POOL[pooling](rows).astype(np.float64)
    if normalize:
        lengths = np.sqrt(np.sum(vectors * vectors, axis=-1, keepdims=True))
        vectors = vectors / np.where(lengths == 0.0, 1.0, lengths)
    return vectors.astype(np.float32)
