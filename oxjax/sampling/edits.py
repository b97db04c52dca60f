"""Adjustments of single logits: biases, bans, and ends before `min_tokens`."""

from __future__ import annotations

from collections.abc import Collection

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from oxjax.errors import InvalidRequestError
from oxjax.sampling.params import SamplingParams

EDIT = np.dtype([("ids", np.int32), ("until", np.int32), ("values", np.float32), ("late", np.int32)])
LEAST_EDITS = 16  # per row, that programs are compiled for: so few cost nothing
ALWAYS = 2**31 - 1


@struct.dataclass
class Edits:
    """Numbers that are added to single logits, `[N, E]` each; -inf forbids a token.

    Attributes:
        ids: whose logits.
        until: the first position whose token is not concerned any more; 0 where there is nothing to add.
        values: what is added.
        late: whether it is added after the penalties instead of before.
    """

    ids: Int[Array, "N E"]
    until: Int[Array, "N E"]
    values: Float[Array, "N E"]
    late: Int[Array, "N E"]

    def at(self, positions: Int[Array, " N"]) -> Float[Array, "N E"]:
        """Numbers to add to the logits at these positions."""
        return jnp.where(positions[:, None] < self.until, self.values, 0.0)


def add_edits(
    logits: Float[Array, "N vocab"], edits: Edits, positions: Int[Array, " N"], *, late: bool = False
) -> Float[Array, "N vocab"]:
    """Logits for tokens at these positions, with the late edits or the others added."""
    rows = jnp.arange(len(logits), dtype=jnp.int32)[:, None]
    return logits.at[rows, edits.ids].add(jnp.where((edits.late > 0) == late, edits.at(positions), 0.0))


def edits_of(params: SamplingParams, eog_ids: Collection[int], n_prompt: int, vocab_size: int) -> np.ndarray:
    """A request's edits as records of `EDIT`, an id at most twice: with a bias, and forbidden.

    Args:
        params: the request's.
        eog_ids: the tokens that end a text.
        n_prompt: tokens of the prompt.
        vocab_size: of the model.

    Raises:
        InvalidRequestError: an id is not in the vocabulary, or no token is left to choose.
    """
    banned = set(params.banned_tokens)
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eog_ids)) if params.min_tokens else set()
    edits = [(i, ALWAYS, bias) for i, bias in params.logit_bias if i not in banned]
    edits += [(i, ALWAYS, -np.inf) for i in sorted(banned)]
    edits += [(i, n_prompt + params.min_tokens, -np.inf) for i in sorted(ends - banned)]
    named = {i for i, _ in params.logit_bias} | banned | set(params.stop_token_ids)
    if wrong := [i for i in named if i >= vocab_size]:
        raise InvalidRequestError(f"token id {min(wrong)} is outside the vocabulary of {vocab_size}")
    if len(banned | ends) == vocab_size:
        raise InvalidRequestError(f"all {vocab_size} tokens of the vocabulary are forbidden")
    return np.array([(*edit, False) for edit in edits], EDIT)
