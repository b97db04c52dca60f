"""Constrained decoding: languages that an output has to be in, and masks of the tokens that keep it there."""

from oxjax.constrain.grammar import Grammar

__all__ = ["Grammar"]
