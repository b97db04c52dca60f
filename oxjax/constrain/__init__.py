"""Constrained decoding on the host: which tokens keep an output inside the language of a grammar."""

from oxjax.constrain.grammar import Grammar
from oxjax.constrain.matcher import GrammarCompiler, Matcher

__all__ = ["Grammar", "GrammarCompiler", "Matcher"]
