"""Paths of the models that come with the package."""

from __future__ import annotations

from pathlib import Path


def embedded_model() -> Path:
    """The story model that `LLM()` loads."""
    return Path(__file__).with_name("demo.gguf")


def embedded_draft() -> Path:
    """A ten times smaller model with the same tokenizer; nothing in oxjax uses it yet."""
    return Path(__file__).with_name("demo-draft.gguf")
