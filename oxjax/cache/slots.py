"""Recurrent state on the device: a value of fixed size per slot, immutable, donated, ignorant of requests."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from oxjax.batch import RowLayout


@struct.dataclass
class RecurrentState:
    """State of one recurrent layer after some number of tokens, `[slots, ...]` float32 each.

    Slot ids mean the same on every layer. Slot 0 takes what padding writes.

    Attributes:
        conv: last inputs of a causal convolution, `[slots, kernel - 1, channels]`.
        ssm: the recurrence's own state; its shape is the layer's business.
    """

    conv: Float[Array, "slots window channels"]
    ssm: Float[Array, "slots ..."]


def read_slots(state: RecurrentState, layout: RowLayout) -> RecurrentState:
    """The state that each sequence of the batch goes on from, `[S, ...]`; zero where one begins.

    What a slot held before a sequence begins never matters, so slots need no clearing.
    """

    def read(array: Array) -> Array:
        begins = layout.begins.reshape(-1, *(1,) * (array.ndim - 1))
        return jnp.where(begins, jnp.zeros((), array.dtype), array[layout.read_slots])

    return jax.tree.map(read, state)


def write_slots(state: RecurrentState, new: RecurrentState, layout: RowLayout) -> RecurrentState:
    """Put what the batch's sequences ended with, `[S, ...]`, in their new slots; in place when donated."""
    return jax.tree.map(lambda array, value: array.at[layout.write_slots].set(value.astype(array.dtype)), state, new)
