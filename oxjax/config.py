"""Model configs: the static facts of a model, frozen and hashable, static under `jax.jit`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import jax.numpy as jnp

from oxjax.kernels.numerics import Numerics
from oxjax.models.layers.rope import RopeSpec

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
POOLINGS = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}  # `<arch>.pooling_type`; GGUF has no "max"


@dataclass(frozen=True)
class TemperatureSpec:
    """Temperature of queries by position: 1 + scale · ln(1 + floor((position + offset) / length)) (Llama 4)."""

    scale: float
    length: int
    offset: int = 0


@dataclass(frozen=True)
class AttentionSpec:
    """Multi-head attention over pages: its static facts.

    Attributes:
        n_heads: query heads.
        n_kv_heads: key and value heads; divides `n_heads`.
        key_dim: head dimension of queries and keys.
        value_dim: head dimension of values.
        scale: multiplier of attention scores.
        rope: index into `ModelConfig.ropes`, or None where positions are not rotated.
        window: sliding window in tokens, the query included; None attends to all.
        softcap: c in c · tanh(score / c); None for no cap.
        clamp: bound of the magnitude of projected queries, keys and values; None for no bound.
        alibi: largest bias of ALiBi, which sets the slope of every head; None for no bias.
        temperature: factor of the queries by position, after their rotation; None for none.
        chunk: a query sees only keys of its own chunk of this many positions, counted from 0; None sees all.
        norm_rotated: rotated queries and keys are normalised, without weights.
        sinks: every head has a logit of its own in the softmax's denominator.
    """

    n_heads: int
    n_kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    rope: int | None = 0
    window: int | None = None
    softcap: float | None = None
    clamp: float | None = None
    alibi: float | None = None
    temperature: TemperatureSpec | None = None
    chunk: int | None = None
    norm_rotated: bool = False
    sinks: bool = False

    @property
    def cached(self) -> int:
        """Cached numbers per position."""
        return self.n_kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class LatentSpec:
    """Multi-head latent attention over pages: its static facts (DeepSeek-V2, https://arxiv.org/abs/2405.04434).

    Attributes:
        n_heads: query heads.
        q_rank: rank of the projection to queries; None where it has full rank.
        kv_rank: width of the latent that stands for all heads' keys and values.
        nope_dim: head dimensions of queries and keys that are not rotated.
        rope_dim: those that are, unless nothing is; all heads share their keys.
        value_dim: head dimension of values.
        scale: multiplier of attention scores.
        rope: index into `ModelConfig.ropes`; None where nothing is rotated.
        temperature: factor of the queries by position, after their rotation; None for none.
    """

    n_heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    scale: float
    rope: int | None = 0
    temperature: TemperatureSpec | None = None

    @property
    def cached(self) -> int:
        """Cached numbers per position."""
        return self.kv_rank + self.rope_dim


@dataclass(frozen=True)
class RecurrentSpec:
    """A recurrence: shapes of its state. Each kind of recurrence adds its own facts.

    Attributes:
        conv: shape of a sequence's convolution window, (kernel - 1, channels).
        ssm: shape of a sequence's recurrent state.
    """

    conv: tuple[int, int]
    ssm: tuple[int, ...]


MixerSpec = AttentionSpec | LatentSpec | RecurrentSpec


@dataclass(frozen=True)
class MLPSpec:
    """A feed-forward layer.

    Attributes:
        d_ff: its inner width.
        activation: a key of `layers.mlp.ACTIVATIONS`.
        gated: the activation applies to a gate, which multiplies the inner values (GLU); else to the inner values.
    """

    d_ff: int
    activation: str
    gated: bool = True


@dataclass(frozen=True)
class MoESpec:
    """A mixture of experts (MoE): feed-forward layers, of which each row uses a few.

    Attributes:
        n_experts: number of experts.
        n_experts_per_token: number of experts that a row uses.
        d_ff: inner width of each.
        activation: a key of `layers.mlp.ACTIVATIONS`.
        norm_topk_prob: the router weights of the used experts are divided by their sum.
        shared: the expert that every row uses besides; None for none.
        gated: see `MLPSpec.gated`.
        gating: function from router logits to weights: "softmax" over all experts, "sigmoid" of each, or
            "softmax_topk", the softmax over those that are used.
        scale: multiplier of the weights.
        n_groups: groups of neighbouring experts, ranked by the sum of their two best scores.
        n_groups_used: groups that a row may use experts of.
        router_weight_on_input: the weights multiply the input of the experts, not their output.
        output_scale: multiplier of the sum, shared expert included.
        d_latent: width of the experts' inputs and outputs, with projections down to it and back up; None is the
            width of the model. The router and the shared expert always read rows of that width.
    """

    n_experts: int
    n_experts_per_token: int
    d_ff: int
    activation: str = "silu"
    norm_topk_prob: bool = True
    shared: MLPSpec | None = None
    gated: bool = True
    gating: str = "softmax"
    scale: float = 1.0
    n_groups: int = 1
    n_groups_used: int = 1
    router_weight_on_input: bool = False
    output_scale: float = 1.0
    d_latent: int | None = None


@dataclass(frozen=True)
class LayerSpec:
    """Static facts of one transformer block. Equal blocks compare equal, so they share one trace.

    Attributes:
        mixers: attention or recurrences, which mix positions, each with a state of its own; most blocks have one.
        mlp: the feed-forward layer; None where a block has none.
        parallel: the feed-forward layer reads the block's input, beside the mixers.
    """

    mixers: tuple[MixerSpec, ...]
    mlp: MLPSpec | MoESpec | None = None
    parallel: bool = False


@dataclass(frozen=True)
class RankSpec:
    """A reranker's head, which scores how well a document answers a query: its static facts.

    Attributes:
        n_labels: scores that it gives; the first one ranks.
        pooling: what hidden state it reads, "cls", "mean" or "last".
        activation: after its dense map, a key of `layers.mlp.ACTIVATIONS`.
        softmax: the scores are probabilities.
    """

    n_labels: int
    pooling: str
    activation: str
    softmax: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of a model: its architecture, and the numerics that it is computed with.

    Attributes:
        architecture: `general.architecture`; names the file under `oxjax/models`.
        vocab_size: rows of the embedding.
        d_model: width of the residual stream.
        context_length: tokens that the model was trained for.
        norm_eps: epsilon of every norm.
        norm: what the norms of the residual stream and of queries and keys are, "rms" or "layer".
        norm_weights: whether the norms have weights.
        layers: one entry per block.
        ropes: the distinct rotations; layers point into it.
        embedding_scale: multiplier of token embeddings.
        embedding_norm: token embeddings are normalised.
        learned_positions: every position has a vector that is added to its token's.
        residual_scale: multiplier of what a branch adds to the residual stream.
        logit_scale: multiplier of the logits.
        final_softcap: cap of the logits; None for no cap.
        dtype: of activations and pages. Norms, softmax, RoPE and logits are float32 always.
        numerics: exactness, activations of quantised products, and backend.
        causal: positions see earlier ones only; an encoder (not causal) sees whole texts and generates nothing.
        pooling: how a text's hidden states become its embedding unless a call says; a value of `POOLINGS`.
        rank: the head that ranks documents; None where the file has none.
    """

    architecture: str
    vocab_size: int
    d_model: int
    context_length: int
    norm_eps: float
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    norm: str = "rms"
    norm_weights: bool = True
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    learned_positions: bool = False
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    final_softcap: float | None = None
    dtype: str = "float32"
    numerics: Numerics = field(default_factory=Numerics)
    causal: bool = True
    pooling: str = "last"
    rank: RankSpec | None = None

    @property
    def mixers(self) -> tuple[MixerSpec, ...]:
        """The mixers of all blocks, in order."""
        return tuple(mixer for layer in self.layers for mixer in layer.mixers)

    def page_bytes(self, page_size: int) -> int:
        """Bytes that one page takes over all layers; 0 for an encoder, which keeps nothing."""
        if not self.causal:
            return 0
        numbers = sum(s.cached for s in self.mixers if not isinstance(s, RecurrentSpec))
        return numbers * page_size * jnp.dtype(DTYPES[self.dtype]).itemsize

    @property
    def slot_bytes(self) -> int:
        """Bytes that the recurrent state of one sequence takes over all layers; 0 without recurrent layers."""
        return 4 * sum(math.prod(s.conv) + math.prod(s.ssm) for s in self.mixers if isinstance(s, RecurrentSpec))
