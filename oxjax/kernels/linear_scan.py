"""Recurrences whose state is a matrix, in C++: what `models.layers.recurrence` does row by row where there is none."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oxjax.batch import RowLayout
from oxjax.kernels.native import ffi_call


def linear_scan(
    query: Float[Array, "T key_heads key_dim"],
    decay: Float[Array, "T n_heads decays"],
    key: Float[Array, "T key_heads key_dim"],
    value: Float[Array, "T n_heads value_dim"],
    initial: Float[Array, "S n_heads key_dim value_dim"],
    layout: RowLayout,
    *,
    read: Float[Array, "T key_heads key_dim"] | None = None,
    write: Float[Array, "T key_heads key_dim"] | None = None,
    bonus: Float[Array, "key_heads key_dim"] | None = None,
) -> tuple[Float[Array, "T n_heads value_dim"], Float[Array, "S n_heads key_dim value_dim"]]:
    """h ← decay h + key ⊗ (value - hᵀ read); y = hᵀ query, for each head. All is float32, and bits are exact.

    Args:
        query: what reads the state out; head h uses key head h // (n_heads / key_heads).
        decay: one number per head, or one per key channel.
        key: where `value` is stored.
        value: what is stored.
        initial: states that the sequences go on from.
        layout: which rows belong to which sequence.
        read: see above; nothing is subtracted without it.
        write: h ← decay h + key ⊗ value - write ⊗ hᵀ read instead.
        bonus: y = (h + (bonus key) ⊗ value)ᵀ query comes before the state changes; not with `read`.

    Returns:
        the output of every row, zeros for padding, and the state after each sequence's rows.
    """
    results = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in (value, initial)]
    read, write, bonus = (jnp.zeros(0) if a is None else a for a in (read, write, bonus))
    rows = (query, decay, key, value, read, write, bonus)
    return tuple(ffi_call("linear_scan", results)(*rows, initial, layout.starts, layout.ends))
