"""Prompts as callers give them: a text or token ids, one or several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from jaxtyping import Int

from oxjax.errors import InvalidRequestError, TokenizerError

Prompt = str | Sequence[int] | Int[np.ndarray, " _"]


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Prompts, of which one may have been given by itself."""
    if isinstance(prompts, str) or getattr(prompts, "ndim", 2) == 1:
        return [prompts]
    prompts = list(prompts)  # one prompt of ids, or several of any kind
    return [prompts] if prompts and isinstance(prompts[0], (int, np.integer)) else prompts


@contextmanager
def refusing_texts() -> Iterator[None]:
    """A text that cannot be tokenised is that request's error.

    Raises:
        InvalidRequestError: there was one.
    """
    try:
        yield
    except TokenizerError as error:
        raise InvalidRequestError(str(error)) from error
