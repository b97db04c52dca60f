"""phi3 (Phi-3, 3.5 and 4-mini): half-split RoPE, partial in phi-4-mini, LongRoPE factors; q, k, v in one
tensor and gate, up in one. Its sliding window is ignored: the published models were trained without it.
"""

from __future__ import annotations

from oxjax.models.arch.llama import block, layer
from oxjax.models.arch.qwen2 import config

__all__ = ["block", "config", "layer"]
