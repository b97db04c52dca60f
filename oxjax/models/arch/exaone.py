"""exaone (EXAONE 3 and 3.5): llama with half-split RoPE, and `rope_freqs` as in Llama 3."""

from __future__ import annotations

from oxjax.models.arch.llama import block, layer
from oxjax.models.arch.qwen2 import config

__all__ = ["block", "config", "layer"]
