"""Constrained decoding: grammars of outputs, and masks of the tokens that a grammar allows next."""

from oxjax.constrain.grammar import Grammar

__all__ = ["Grammar"]
