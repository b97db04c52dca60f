"""GGUF files: typed metadata, lazily mapped tensors, exact dequantisation. Imports no JAX."""

from oxjax.gguf.file import REQUIRED, GGUFFile, shard_names
from oxjax.gguf.ggml_types import GGMLType, block_layout
from oxjax.gguf.metadata import Metadata, Value
from oxjax.gguf.quants import dequantize
from oxjax.gguf.shard import TensorInfo

__all__ = [
    "REQUIRED",
    "GGMLType",
    "GGUFFile",
    "Metadata",
    "TensorInfo",
    "Value",
    "block_layout",
    "dequantize",
    "shard_names",
]
