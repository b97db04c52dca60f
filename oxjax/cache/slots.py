"""Slots of recurrent state on the device: one value of fixed size each, immutable, donated, ignorant of requests."""

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
        ssm: state of the recurrence; its shape depends on the kind of layer.
    """

    conv: Float[Array, "slots window channels"]
    ssm: Float[Array, "slots ..."]


def read_slots(state: RecurrentState, layout: RowLayout) -> RecurrentState:
    """Read the state that each sequence of the batch continues from, `[S, ...]`; zero where one begins.

    The old content of a slot never matters to a sequence that begins, so slots are not cleared.
    """

    def read(array: Array) -> Array:
        begins = layout.begins.reshape(-1, *(1,) * (array.ndim - 1))
        return jnp.where(begins, jnp.zeros((), array.dtype), array[layout.read_slots])

    return jax.tree.map(read, state)


def write_slots(state: RecurrentState, new: RecurrentState, layout: RowLayout) -> RecurrentState:
    """Write the new state of each sequence of the batch, `[S, ...]`, to its slot; in place when donated."""
    return jax.tree.map(lambda array, value: array.at[layout.write_slots].set(value.astype(array.dtype)), state, new)
