"""codeshell: starcoder2 with q, k and v in one tensor."""

from __future__ import annotations

from oxjax.models.arch.starcoder2 import block, config, layer

__all__ = ["block", "config", "layer"]
