"""What a model is, apart from its numbers: frozen, hashable, static under `jax.jit`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp

from oxjax.models.layers.rope import RopeSpec

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class LayerSpec:
    """One attention layer's static facts. Equal layers compare equal, so they share one trace.

    Attributes:
        n_heads: query heads.
        n_kv_heads: key and value heads; divides `n_heads`.
        key_dim: head dimension of queries and keys.
        value_dim: head dimension of values.
        scale: multiplier of attention scores.
        rope: index into `ModelConfig.ropes`, or None where positions are not rotated.
        window: sliding window in tokens, the query included; None attends to all.
        softcap: cap of attention scores; None for no cap.
    """

    n_heads: int
    n_kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    rope: int | None = 0
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class RecurrentSpec:
    """One recurrent layer's static facts, as far as its state goes; a layer's own spec may add to them.

    Attributes:
        conv: shape of a sequence's convolution window, (kernel - 1, channels).
        ssm: shape of a sequence's recurrent state.
    """

    conv: tuple[int, int]
    ssm: tuple[int, ...]


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one file and how it is computed.

    Attributes:
        architecture: `general.architecture`; names the file under `oxjax/models`.
        vocab_size: rows of the embedding.
        d_model: width of the residual stream.
        d_ff: width of the gated feed-forward layer.
        context_length: tokens that the model was trained for.
        norm_eps: epsilon of every norm.
        activation: of the feed-forward gate, a key of `layers.mlp.ACTIVATIONS`.
        layers: one entry per block.
        ropes: the distinct rotations; layers point into it.
        embedding_scale: multiplier of token embeddings.
        final_softcap: cap of the logits; None for no cap.
        dtype: of weights, activations and pages. Norms, softmax, RoPE and logits are float32 always.
        exact: bits of a row do not depend on batch, chunking or padding.
    """

    architecture: str
    vocab_size: int
    d_model: int
    d_ff: int
    context_length: int
    norm_eps: float
    activation: str
    layers: tuple[LayerSpec | RecurrentSpec, ...]
    ropes: tuple[RopeSpec, ...]
    embedding_scale: float = 1.0
    final_softcap: float | None = None
    dtype: str = "float32"
    exact: bool = True

    def page_bytes(self, page_size: int) -> int:
        """Bytes that one page takes over all layers."""
        paged = (s for s in self.layers if isinstance(s, LayerSpec))
        numbers = sum(s.n_kv_heads * (s.key_dim + s.value_dim) for s in paged)
        return numbers * page_size * jnp.dtype(DTYPES[self.dtype]).itemsize

    @property
    def slot_bytes(self) -> int:
        """Bytes that the recurrent state of one sequence takes over all layers; 0 without recurrent layers."""
        return 4 * sum(math.prod(s.conv) + math.prod(s.ssm) for s in self.layers if isinstance(s, RecurrentSpec))
