"""From a path to a model that `step` can run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from flax import struct

from oxjax.config import DTYPES, POOLINGS, ModelConfig
from oxjax.errors import ModelError, UnsupportedArchitectureError
from oxjax.gguf import GGMLType, GGUFFile
from oxjax.kernels import native
from oxjax.kernels.quantized import ACTIVATIONS
from oxjax.models.architectures import Architecture, architecture
from oxjax.models.base import Frequencies
from oxjax.models.decoder import Params
from oxjax.models.encoder import EncoderParams
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.norms import Norm
from oxjax.models.loader import ParamLoader
from oxjax.models.rank import load_head, rank_spec
from oxjax.tokenizer import Tokenizer

QUANTIZE = {"q8_0": GGMLType.Q8_0, "q4_0": GGMLType.Q4_0}
WEIGHTS = ("auto", "quantized", *DTYPES)
_LOADING_THREADS = min(8, os.cpu_count() or 1)  # each holds a few MiB beside what it loads
# Per-layer copies of the rotation table, which old converters wrote and nothing ever read.
_IGNORED = (".attn_rot_embd.weight", ".rope_freqs.weight")


@struct.dataclass
class Model:
    """A loaded model: static config, parameters on the device, and the file's own tokenizer."""

    config: ModelConfig = struct.field(pytree_node=False)
    params: Params | EncoderParams
    tokenizer: Tokenizer = struct.field(pytree_node=False)


def load(
    path: str | Path,
    *,
    dtype: str = "float32",
    weights: str = "auto",
    activations: str = "int8",
    quantize: str | None = None,
    exact: bool = True,
    max_context: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Load a GGUF model.

    Args:
        path: a GGUF file, any shard of a split one, or a directory that holds one model.
        dtype: "float32" or "bfloat16", of activations and pages.
        weights: how matrices are held. "quantized" keeps them as in the file: integers where the format allows it,
            float16 and bfloat16 as they are, and what is neither in the dtype. Products with integers round
            activations to 8 bits where there are native kernels, as llama.cpp's do. "float32" and "bfloat16"
            dequantise. "auto" is "quantized" where there are native kernels, else the dtype.
        activations: what quantised matrices are multiplied with: "int8", which is fast, or "float32", which computes
            what dequantised weights would, in the memory of quantised ones.
        quantize: "q8_0" or "q4_0" quantises the file's float32, float16 and bfloat16 matrices, whose rows must be of
            a multiple of 32, while they are loaded, as the `gguf` package does. It goes with quantised weights.
        exact: see `ModelConfig.exact`.
        max_context: tokens per sequence to prepare for; only LongRoPE models depend on it.
        progress: called with (bytes read, bytes in all) while tensors are read.

    Raises:
        GGUFError: the file is not a sound GGUF file.
        UnsupportedArchitectureError: its architecture is not known; see `oxjax.models.architectures`.
        ModelError: its metadata and tensors do not fit together; names both numbers.
        TokenizerError: its vocabulary cannot be used.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    with GGUFFile.open(path) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata, source=str(file.path))
        config, params = load_params(
            file,
            dtype=dtype,
            weights=weights,
            activations=activations,
            quantize=quantize,
            exact=exact,
            max_context=max_context,
            progress=progress,
        )
    return Model(config=config, params=params, tokenizer=tokenizer)


def load_params(
    file: GGUFFile,
    *,
    dtype: str = "float32",
    weights: str = "auto",
    activations: str = "int8",
    quantize: str | None = None,
    exact: bool = True,
    max_context: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ModelConfig, Params | EncoderParams]:
    """The config and parameters of an open file, without its tokenizer; see `load`."""
    for name, value, known in (("weights", weights, WEIGHTS), ("activations", activations, ACTIVATIONS)):
        if value not in known:
            raise ModelError(f"{name} {value!r} is not one of {', '.join(known)}")
    if quantize is not None and quantize not in QUANTIZE:
        raise ModelError(f"quantize {quantize!r} is not one of {', '.join(QUANTIZE)}")
    if quantize is not None and weights not in ("auto", "quantized"):
        raise ModelError(f"quantize {quantize!r} makes quantised weights, but weights is {weights!r}")
    if weights == "auto":
        weights = "quantized" if quantize is not None or native.kernels() else dtype
    total = sum(info.n_bytes for info in file.tensors.values())
    tensors = ParamLoader(
        file,
        dtype,
        None if progress is None else lambda done: progress(done, total),
        weights=weights,
        activations=activations,
        quantize=None if quantize is None else QUANTIZE[quantize],
    )
    family, config, frequencies = _configure(file, tensors, max_context)
    config = dataclasses.replace(config, dtype=dtype, exact=exact)
    params = (_decoder if config.causal else _encoder)(tensors, family, config, frequencies)
    tensors.finish(ignore=_IGNORED)
    return config, params


def _decoder(tensors: ParamLoader, family: Architecture, config: ModelConfig, frequencies: Frequencies) -> Params:
    tied = not tensors.has("output.weight")
    vocab, d = config.vocab_size, config.d_model
    with ThreadPoolExecutor(_LOADING_THREADS) as pool:  # decoding spends its time in NumPy, which lets others run
        embedding = tensors.embedding("token_embd.weight", vocab, d, pool)
        output = None if tied else tensors.linear("output", d, vocab, pool=pool)
        layers = tuple(
            pool.map(lambda i: family.layer(tensors, i, config.layers[i], config), range(len(config.layers)))
        )
    return Params(
        embedding=embedding,
        layers=layers,
        final_norm=tensors.norm(family.final_norm, config.d_model) if config.norm_weights else Norm(),
        output=output,
        rope_inv_freq=tuple(jax.device_put(f) for f in frequencies),
        positions=tensors.table("position_embd.weight", config.context_length, config.d_model)
        if config.learned_positions
        else None,
        embedding_norm=tensors.norm("token_embd_norm", config.d_model) if config.embedding_norm else None,
        rank=load_head(tensors, config),
    )


def _encoder(
    tensors: ParamLoader, family: Architecture, config: ModelConfig, frequencies: Frequencies
) -> EncoderParams:
    d, types, final = config.d_model, "token_types.weight", family.final_norm
    token_type = None
    if tensors.has(types):
        token_type = tensors.table(types, tensors.file.tensors[types].shape[0], d)[0]
    return EncoderParams(
        embedding=tensors.embedding("token_embd.weight", config.vocab_size, d),
        layers=tuple(family.layer(tensors, i, s, config) for i, s in enumerate(config.layers)),
        rope_inv_freq=tuple(jax.device_put(f) for f in frequencies),
        positions=tensors.table("position_embd.weight", config.context_length, d) if config.learned_positions else None,
        token_type=token_type,
        embedding_norm=tensors.norm("token_embd_norm", d) if config.embedding_norm else None,
        final_norm=None if final is None else tensors.norm(final, d),
        rank=load_head(tensors, config),
    )


def load_config(file: GGUFFile) -> ModelConfig:
    """The config of an open file, for float32; reads no tensor but small tables of rotation factors."""
    return _configure(file, ParamLoader(file, "float32"), None)[1]


def _configure(
    file: GGUFFile, tensors: ParamLoader, max_context: int | None
) -> tuple[Architecture, ModelConfig, Frequencies]:
    name = file.get("general.architecture", str)
    try:
        family = architecture(name)
    except UnsupportedArchitectureError as error:
        raise UnsupportedArchitectureError(f"{file.path}: {error}") from None
    hp = Hyperparameters(file, max_context)
    config, frequencies = family.config(hp, tensors)
    pooling = hp.get("pooling_type", int, None)
    if pooling is None:
        config = dataclasses.replace(config, pooling="last" if config.causal else "mean")
    elif pooling in POOLINGS:
        config = dataclasses.replace(config, pooling=POOLINGS[pooling])
    else:
        raise hp.error("pooling_type", f"found {pooling}, expected one of {', '.join(map(str, POOLINGS))}")
    config = dataclasses.replace(config, rank=rank_spec(hp, tensors, causal=config.causal))
    hp.finish()
    if config.learned_positions and hp.max_context > config.context_length:
        message = f"{config.context_length} positions were learned, but max_context is {hp.max_context}"
        raise hp.error("context_length", message)
    for i in range(hp.n_layers, hp.n_blocks):
        tensors.skip(f"blk.{i}.")
    return family, config, frequencies
