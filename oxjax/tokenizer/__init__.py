"""GGUF vocabularies: text to token ids and back, as llama.cpp does it for the same file."""

from oxjax.tokenizer.detokenizer import IncrementalDetokenizer
from oxjax.tokenizer.tokenizer import Tokenizer

__all__ = ["IncrementalDetokenizer", "Tokenizer"]
