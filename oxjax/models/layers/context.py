"""Inputs that all layers of a step share."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Array, Float

from oxjax.batch import RowLayout
from oxjax.config import ModelConfig

Angles = tuple[Float[Array, "T half"], Float[Array, "T half"]]


@dataclass(frozen=True)
class Context:
    """A step as its layers see it, besides their own parameters and state. Made while tracing.

    Attributes:
        layout: where rows read and write.
        angles: cosines and sines of the rows' positions for each of `config.ropes`.
        config: the model's.
    """

    layout: RowLayout
    angles: tuple[Angles, ...]
    config: ModelConfig
