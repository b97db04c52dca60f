"""A causal language model as one pure step: `step(params, state, batch, config) -> (logits, state)`."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from oxjax.batch import Batch, RowLayout, padded, row_layout
from oxjax.cache.pages import KVPages, LatentPages
from oxjax.cache.slots import RecurrentState
from oxjax.cache.transfer import page_arrays
from oxjax.config import DTYPES, LatentSpec, LayerSpec, MixerSpec, ModelConfig, RecurrentSpec
from oxjax.kernels.dot import min_rows
from oxjax.kernels.paged_attention import q_tile_rows
from oxjax.kernels.quantized import QuantizedTensor
from oxjax.models.layers.block import LayerState
from oxjax.models.layers.context import Angles, Context
from oxjax.models.layers.linear import Linear, linear, lookup, tied_logits
from oxjax.models.layers.norms import Norm, norm
from oxjax.models.layers.rope import rope_angles
from oxjax.models.rank import RankHead

EngineState = tuple[LayerState, ...]


@struct.dataclass
class Params:
    """All numbers of a model.

    Attributes:
        embedding: `[vocab, d_model]`, or quantised as `[d_model, vocab]`.
        layers: one per block.
        final_norm: before the logits.
        output: `[d_model, vocab]`; None where the embedding serves as the output matrix.
        rope_inv_freq: angle per position of each pair, `[dim/2]` float32, one per `config.ropes`.
        positions: learned vectors of the positions, `[context, d_model]`, where the architecture has them.
        embedding_norm: of token embeddings, where the architecture has it.
        rank: the head that ranks documents, where the file has one.
    """

    embedding: Float[Array, "vocab d_model"] | QuantizedTensor
    layers: tuple[Any, ...]
    final_norm: Norm
    output: Linear | None
    rope_inv_freq: tuple[Float[Array, " _"], ...]
    positions: Float[Array, "context d_model"] | None = None
    embedding_norm: Norm | None = None
    rank: RankHead | None = None


def init_state(config: ModelConfig, *, n_pages: int, page_size: int, n_slots: int = 1) -> EngineState:
    """Empty pages and slots for every layer, zero-filled; page 0 and slot 0 take what padding writes."""
    dtype = DTYPES[config.dtype]

    def empty(s: MixerSpec) -> KVPages | LatentPages | RecurrentState:
        if isinstance(s, RecurrentSpec):
            return RecurrentState(conv=jnp.zeros((n_slots, *s.conv)), ssm=jnp.zeros((n_slots, *s.ssm)))
        if isinstance(s, LatentSpec):
            return LatentPages(
                latent=jnp.zeros((n_pages, page_size, s.kv_rank), dtype),
                rope_k=jnp.zeros((n_pages, page_size, s.rope_dim), dtype),
            )
        return KVPages(
            k=jnp.zeros((n_pages, page_size, s.n_kv_heads, s.key_dim), dtype),
            v=jnp.zeros((n_pages, page_size, s.n_kv_heads, s.value_dim), dtype),
        )

    return tuple(tuple(empty(s) for s in layer.mixers) for layer in config.layers)


@partial(jax.jit, static_argnames=("spec", "config"))  # equal layers share one trace
def _block(
    p: Any,
    x: Array,
    state: LayerState,
    layout: RowLayout,
    angles: tuple[Angles, ...],
    *,
    spec: LayerSpec,
    config: ModelConfig,
) -> tuple[Array, LayerState]:
    return p.apply(x, state, spec, Context(layout, angles, config))


def step(
    params: Params, state: EngineState, batch: Batch, config: ModelConfig
) -> tuple[Float[Array, "N vocab"], EngineState]:
    """Run the rows of a batch through the model. Pure; jit it with `config` static and `state` donated.

    Args:
        params: the model's numbers.
        state: one entry per layer. Keys and values of the batch's rows are written to the pages that the
            batch's block tables name, recurrent states to its write slots; everything else is carried over.
        batch: flat rows. Positions of one sequence continue what its pages already hold.
        config: static.

    Returns:
        float32 logits of `batch.logits_rows`, `[N, vocab]`, and the new state.
    """
    x, new_state = hidden_states(params, state, batch, config)
    return logits_of(params, x, config), new_state


def hidden_states(
    params: Params, state: EngineState, batch: Batch, config: ModelConfig
) -> tuple[Float[Array, "N d_model"], EngineState]:
    """Hidden states of rows after the final norm, in the model's dtype, and the new state."""
    batch = padded(batch, min_rows(config.numerics))
    page_size = next((array.shape[1] for array in page_arrays(state)), 1)
    q_tile = q_tile_rows(batch.tokens.shape[0], batch.kv_lens.shape[0], config.numerics)
    layout = row_layout(batch, page_size=page_size, q_tile=q_tile)
    angles = tuple(
        rope_angles(batch.positions, inv_freq, spec.mscale)
        for inv_freq, spec in zip(params.rope_inv_freq, config.ropes, strict=True)
    )
    x = jnp.where(layout.is_real[:, None], _embed(params, batch, config), 0)  # kernels skip rows of zeros
    new_state = []
    for p, spec, old in zip(params.layers, config.layers, state, strict=True):
        x, new = _block(p, x, old, layout, angles, spec=spec, config=config)
        new_state.append(new)
    # What blocks pass on beside the residual stream lies in columns past it.
    x = norm(params.final_norm, x[batch.logits_rows, : config.d_model], config)
    return x, tuple(new_state)


def _embed(params: Params, batch: Batch, config: ModelConfig) -> Array:
    x = lookup(params.embedding, batch.tokens, DTYPES[config.dtype])
    if config.embedding_scale != 1.0:
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
    if params.positions is not None:
        x = x + params.positions[batch.positions]
    return x if params.embedding_norm is None else norm(params.embedding_norm, x, config)


def logits_of(params: Params, x: Float[Array, "N d_model"], config: ModelConfig) -> Float[Array, "N vocab"]:
    """Float32 logits of hidden states."""
    if params.output is None:
        logits = tied_logits(params.embedding, x, config.numerics)
    else:
        logits = linear(params.output, x, config.numerics, dtype=jnp.float32)
    if config.logit_scale != 1.0:
        logits = logits * config.logit_scale
    if config.final_softcap is not None:
        logits = config.final_softcap * jnp.tanh(logits / config.final_softcap)
    return logits
