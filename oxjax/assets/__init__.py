"""The models that come with the package."""

from __future__ import annotations

from pathlib import Path


def embedded_model() -> Path:
    """The story model that `LLM()` loads."""
    return Path(__file__).with_name("demo.gguf")


def embedded_draft() -> Path:
    """A ten times smaller model on the same tokenizer."""
    return Path(__file__).with_name("demo-draft.gguf")
