"""Causal convolution of every channel along its sequence, over flat rows."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from oxjax.batch import RowLayout


@struct.dataclass
class Conv:
    """Taps of each channel, the last one for the current row; float32."""

    weight: Float[Array, "kernel channels"]
    bias: Float[Array, " channels"] | None = None


def causal_conv(
    p: Conv, x: Float[Array, "T channels"], window: Float[Array, "S kernel_minus_1 channels"], layout: RowLayout
) -> tuple[Float[Array, "T channels"], Float[Array, "S kernel_minus_1 channels"]]:
    """y[t] = Σ_j weight[j] · x[t - kernel + 1 + j] + bias.

    Args:
        p: the taps.
        x: float32 rows.
        window: the inputs before each sequence's rows, oldest first; zeros where it begins.
        layout: which rows belong to which sequence.

    Returns:
        the output, and the window after each sequence's rows.
    """
    before = window.shape[1]
    place = jnp.arange(x.shape[0], dtype=jnp.int32) - layout.starts[layout.row_seq]
    y = jnp.zeros_like(x) if p.bias is None else jnp.broadcast_to(p.bias, x.shape)
    for tap in range(before):
        # Row `place` of a sequence sees entry `place + tap` of its window and rows laid end to end.
        old = window[layout.row_seq, jnp.minimum(place + tap, before - 1)]
        shifted = jnp.roll(x, before - tap, axis=0)
        y = y + jnp.where((place + tap < before)[:, None], old, shifted) * p.weight[tap]
    y = y + x * p.weight[before]
    entry = (layout.ends - layout.starts)[:, None] + jnp.arange(before, dtype=jnp.int32)
    rows = jnp.clip(layout.starts[:, None] + entry - before, 0, x.shape[0] - 1)
    kept = jnp.take_along_axis(window, jnp.minimum(entry, max(before - 1, 0))[..., None], axis=1) if before else window
    return y, jnp.where((entry < before)[..., None], kept, x[rows])


def previous_rows(
    x: Float[Array, "T channels"], window: Float[Array, "S 1 channels"], layout: RowLayout
) -> tuple[Float[Array, "T channels"], Float[Array, "S 1 channels"]]:
    """The row before each row in its sequence, and the window after: a convolution that sees the past alone.

    Args:
        x: float32 rows.
        window: the row before each sequence's rows; zeros where it begins.
        layout: which rows belong to which sequence.
    """
    first = jnp.arange(x.shape[0], dtype=jnp.int32) == layout.starts[layout.row_seq]
    before = jnp.where(first[:, None], window[layout.row_seq, 0], jnp.roll(x, 1, axis=0))
    last = x[jnp.maximum(layout.ends - 1, 0)]
    return before, jnp.where((layout.starts == layout.ends)[:, None], window[:, 0], last)[:, None]
