"""Rotary position embeddings (Su et al. 2021, https://arxiv.org/abs/2104.09864) and their long-context scalings.

Every scaling that GGUF files ask for reduces to one frequency per pair and one magnitude, computed once on
the host in float64; the device then does `angle = position · inv_freq` for all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from oxjax.kernels.numerics import Numerics
from oxjax.kernels.rotate import rotate


@dataclass(frozen=True)
class RopeSpec:
    """Static facts of a rotary embedding: `dim` leading head dimensions, magnitude `mscale`, and the pairing.

    Pairing "norm" rotates (x[2i], x[2i+1]), "neox" (x[i], x[i + dim/2]).
    """

    dim: int
    pairing: str
    mscale: float = 1.0


@dataclass(frozen=True)
class RopeScaling:
    """`<arch>.rope.scaling.*` of the file; the names and defaults are GGUF's."""

    kind: str = "none"  # none | linear | yarn | longrope
    factor: float = 1.0
    original_context: int = 0
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    log_multiplier: float = 0.0


def rope_frequencies(
    dim: int, theta: float, scaling: RopeScaling, factors: Float[np.ndarray, " half"] | None = None
) -> tuple[Float[np.ndarray, " half"], float]:
    """The angle per position of each pair, float32 `[dim/2]`, and the multiplier of cos and sin.

    Args:
        dim: rotated dimensions, even.
        theta: base of the geometric series.
        scaling: linear divides all angles; YaRN (Peng et al. 2023, https://arxiv.org/abs/2309.00071) blends
            by wavelength; longrope brings its own `factors`.
        factors: divisors per pair (`rope_freqs.weight` of Llama 3, or a longrope set).
    """
    index = np.arange(dim // 2, dtype=np.float64)
    inv_freq = theta ** (-2.0 * index / dim)
    if factors is not None:
        inv_freq = inv_freq / factors.astype(np.float64)
    mscale = scaling.attn_factor
    if scaling.kind == "linear":
        inv_freq = inv_freq / scaling.factor
    elif scaling.kind == "yarn" and scaling.factor != 1.0:
        inv_freq = inv_freq * _yarn_blend(dim, theta, scaling, index)
        grown = 0.1 * math.log(max(scaling.factor, 1.0))
        mscale *= (1.0 + grown) / (1.0 + scaling.log_multiplier * grown)
    return inv_freq.astype(np.float32), float(mscale)


def _yarn_blend(dim: int, theta: float, s: RopeScaling, index: np.ndarray) -> np.ndarray:
    """1 for pairs that turn often within the original context, 1/factor for those that hardly turn."""

    def pair_that_turns(rotations: float) -> float:
        return dim * math.log(s.original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(0.0, math.floor(pair_that_turns(s.beta_fast)))
    high = min(dim - 1.0, math.ceil(pair_that_turns(s.beta_slow)))
    keep = 1.0 - np.clip((index - low) / max(0.001, high - low), 0.0, 1.0)
    return keep + (1.0 - keep) / s.factor


def rope_angles(
    positions: Int[Array, " rows"], inv_freq: Float[Array, " half"], mscale: float
) -> tuple[Float[Array, "rows half"], Float[Array, "rows half"]]:
    """Cosines and sines of each row's position, float32, times the magnitude."""
    angle = positions.astype(jnp.float32)[:, None] * inv_freq
    return jnp.cos(angle) * mscale, jnp.sin(angle) * mscale


def apply_rope(
    x: Float[Array, "rows heads head_dim"],
    angles: tuple[Float[Array, "rows half"], Float[Array, "rows half"]],
    spec: RopeSpec,
    numerics: Numerics,
) -> Float[Array, "rows heads head_dim"]:
    """Rotate the first `spec.dim` dimensions of every head, in float32; the others pass through."""
    return rotate(x, *angles, adjacent=spec.pairing == "norm", numerics=numerics)
