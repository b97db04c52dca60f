"""xverse: llama with another name in the file."""

from __future__ import annotations

from oxjax.models.arch.internlm2 import block, config, layer

__all__ = ["block", "config", "layer"]
