"""A bidirectional encoder as one pure function: `encode(params, texts, config) -> hidden states`."""

from __future__ import annotations

from functools import partial

import jax
from flax import struct
from jaxtyping import Array, Float, Int

from oxjax.config import DTYPES, LayerSpec, ModelConfig
from oxjax.kernels.quantized import QuantizedTensor
from oxjax.kernels.text_attention import TextLayout, text_layout
from oxjax.models.layers.context import Angles
from oxjax.models.layers.encoder import EncoderContext, EncoderLayer, encoder_block
from oxjax.models.layers.linear import lookup
from oxjax.models.layers.norms import Norm, norm
from oxjax.models.layers.rope import rope_angles
from oxjax.models.rank import RankHead


@struct.dataclass
class EncoderParams:
    """All numbers of an encoder.

    Attributes:
        embedding: `[vocab, d_model]`, or quantised as `[d_model, vocab]`.
        layers: one per block.
        rope_inv_freq: angle per position of each pair, `[dim/2]` float32, one per `config.ropes`.
        positions: learned vectors of the positions, where the architecture has them.
        token_type: the vector of the first token type, which all tokens are of, where there are types.
        embedding_norm: of token embeddings.
        final_norm: after the last block.
        rank: the head that ranks documents, where the file has one.
    """

    embedding: Float[Array, "vocab d_model"] | QuantizedTensor
    layers: tuple[EncoderLayer, ...]
    rope_inv_freq: tuple[Float[Array, " _"], ...] = ()
    positions: Float[Array, "context d_model"] | None = None
    token_type: Float[Array, " d_model"] | None = None
    embedding_norm: Norm | None = None
    final_norm: Norm | None = None
    rank: RankHead | None = None


@struct.dataclass
class Texts:
    """Whole texts, flat; int32 arrays of static, bucketed shapes.

    Attributes:
        tokens: ids, `[T]`; rows at and past `cu_lens[-1]` are padding.
        cu_lens: text `s` owns rows `cu_lens[s]` up to `cu_lens[s + 1]`, `[S + 1]`.
    """

    tokens: Int[Array, " T"]
    cu_lens: Int[Array, " S_plus_1"]


@partial(jax.jit, static_argnames=("spec", "config"))  # equal layers share one trace
def _block(
    p: EncoderLayer,
    x: Array,
    layout: TextLayout,
    angles: tuple[Angles, ...],
    *,
    spec: LayerSpec,
    config: ModelConfig,
) -> Array:
    return encoder_block(p, x, spec, EncoderContext(layout, angles, config))


def encode(params: EncoderParams, texts: Texts, config: ModelConfig) -> Float[Array, "T d_model"]:
    """Hidden states of every row after the last block, in the model's dtype. Pure; jit it with `config` static.

    In exact mode the bits of a row depend on its text alone.
    """
    layout = text_layout(texts.cu_lens, texts.tokens.shape[0])
    angles = tuple(
        rope_angles(layout.positions, inv_freq, spec.mscale)
        for inv_freq, spec in zip(params.rope_inv_freq, config.ropes, strict=True)
    )
    x = lookup(params.embedding, texts.tokens, DTYPES[config.dtype])
    if params.token_type is not None:
        x = x + params.token_type
    if params.positions is not None:
        x = x + params.positions[layout.positions]
    if params.embedding_norm is not None:
        x = norm(params.embedding_norm, x, config)
    for p, spec in zip(params.layers, config.layers, strict=True):
        x = _block(p, x, layout, angles, spec=spec, config=config)
    return x if params.final_norm is None else norm(params.final_norm, x, config)
