"""starcoder (StarCoder 1, SantaCoder): gpt2 with one key and value head, which the metadata says."""

from __future__ import annotations

from oxjax.models.arch.gpt2 import block, config, layer

__all__ = ["block", "config", "layer"]
