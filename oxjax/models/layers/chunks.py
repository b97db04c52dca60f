"""Matrix products that do the work of a chunk of rows of a recurrence at once, in float32."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def product(a: Float[Array, "... n k"], b: Float[Array, "... k m"]) -> Float[Array, "... n m"]:
    """Products of float32 matrices inside of a chunk, in full precision."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def inverse_of_unit_lower(lower: Float[Array, "n_heads size size"]) -> Float[Array, "n_heads size size"]:
    """Inverses of matrices with these numbers below a diagonal of ones; the size is a power of two.

    The inverse of [[a, 0], [c, b]] is [[a⁻¹, 0], [-b⁻¹ c a⁻¹, b⁻¹]], from blocks of one number up. Unlike a product
    of powers it never holds numbers larger than the answer's, and unlike LAPACK's solver, which takes up to
    sixty times longer while other programs run, it is nothing but matrix products.
    """
    n_heads, size, _ = lower.shape
    inverse = jnp.ones((n_heads, size, 1, 1), lower.dtype)
    while (width := inverse.shape[-1]) < size:
        corners = [lower[:, at + width : at + 2 * width, at : at + width] for at in range(0, size, 2 * width)]
        a, b = inverse[:, 0::2], inverse[:, 1::2]
        inverse = _lower_blocks(a, -product(product(b, jnp.stack(corners, axis=1)), a), b)
    return inverse[:, 0]


def fading_products(
    late: Float[Array, "n_heads n_late size key_dim"],
    early: Float[Array, "n_heads n_early size key_dim"],
    decay: Float[Array, "n_heads size key_dim"],
) -> tuple[
    Float[Array, "n_heads n_late n_early size size"],
    Float[Array, "n_heads n_late size key_dim"],
    Float[Array, "n_heads n_early size key_dim"],
    Float[Array, "n_heads key_dim"],
]:
    """Products of every row with those before it, each channel of which has faded in the rows that lie between.

    Blocks double from one row up: what the second half of a block has of the first is one matrix product of late rows,
    faded since the middle, with early ones, faded until the middle. A factor is always a product of decays. None is the
    quotient of two, nor comes from a difference of sums of logarithms, so none overflows and none cancels.

    Args:
        late: several kinds of rows.
        early: several kinds of rows.
        decay: what each row leaves of the channels, 0 to 1; the size is a power of two.

    Returns:
        Σₖ late[t] (Π decay between s and t, both excluded) early[s] for every t > s, zero elsewhere; the late rows
        times what decays before them in the chunk; the early rows times what decays after them; all decays' product.
    """
    n_heads, n_late, size, key_dim = late.shape
    n_early = early.shape[1]
    pairs = jnp.zeros((n_heads, n_late, n_early, size, 1, 1), late.dtype)
    whole = decay  # of each block
    while (width := pairs.shape[-1]) < size:
        late = late.reshape(n_heads, n_late, -1, 2, width, key_dim)
        early = early.reshape(n_heads, n_early, -1, 2, width, key_dim)
        corner = product(late[:, :, None, :, 1], jnp.swapaxes(early[:, None, :, :, 0], -1, -2))
        pairs = _lower_blocks(pairs[:, :, :, 0::2], corner, pairs[:, :, :, 1::2])
        first, second = (whole.reshape(n_heads, 1, -1, 2, 1, key_dim)[:, :, :, half] for half in (0, 1))
        late = jnp.stack([late[:, :, :, 0], late[:, :, :, 1] * first], axis=3)
        early = jnp.stack([early[:, :, :, 0] * second, early[:, :, :, 1]], axis=3)
        whole = first * second
    late, early = (y.reshape(n_heads, -1, size, key_dim) for y in (late, early))
    return pairs[:, :, :, 0], late, early, whole.reshape(n_heads, key_dim)


def decay_between(
    decay: Float[Array, "n_heads size"],
) -> tuple[Float[Array, "n_heads size size"], Float[Array, "n_heads size 1"], Float[Array, "n_heads size 1"]]:
    """Decay from row s to row t, zero where s comes later, for heads that decay by one number.

    Returns:
        Π decay after s up to t; the same for all before the chunk; what is left of each row at the chunk's end.
    """
    fading = decay[..., None]
    ones = jnp.ones_like(fading)[:, None]
    pairs, since, until, _ = fading_products(ones, ones, fading)
    return fading * pairs[:, 0, 0] + jnp.eye(decay.shape[1], dtype=decay.dtype), fading * since[:, 0], until[:, 0]


def _lower_blocks(
    a: Float[Array, "... n n"], corner: Float[Array, "... n n"], b: Float[Array, "... n n"]
) -> Float[Array, "... 2*n 2*n"]:
    """[[a, 0], [corner, b]]."""
    top = jnp.concatenate([a, jnp.zeros_like(a)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([corner, b], axis=-1)], axis=-2)
