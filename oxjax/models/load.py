"""Loading of a model that `step` can run from a path."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from flax import struct

from oxjax.config import POOLINGS, ModelConfig
from oxjax.errors import UnsupportedArchitectureError
from oxjax.gguf import GGUFFile
from oxjax.kernels.native import resolve_backend
from oxjax.kernels.numerics import Numerics
from oxjax.models.architectures import Architecture, architecture
from oxjax.models.base import Frequencies
from oxjax.models.decoder import Params
from oxjax.models.encoder import EncoderParams
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.layers.norms import Norm
from oxjax.models.loader import ParamLoader
from oxjax.models.options import LoadOptions, refuse_keywords
from oxjax.models.rank import load_head, rank_spec
from oxjax.tokenizer import Tokenizer

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
    exact: bool = True,
    dtype: str = "float32",
    weights: str = "auto",
    activations: str = "int8",
    backend: str = "auto",
    max_context: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **removed: Any,
) -> Model:
    """Load a GGUF model.

    Args:
        path: a GGUF file, any shard of a split one, or a directory that holds one model.
        exact, dtype, weights, activations, backend, max_context: see `LoadOptions`.
        progress: called with (bytes read, bytes in all) while tensors are read.
        removed: nothing; former keywords are refused with their new spelling.

    Raises:
        GGUFError: the file is not a sound GGUF file.
        UnsupportedArchitectureError: its architecture is not known; see `oxjax.models.architectures`.
        ModelError: its metadata and tensors do not fit together, or an option has no such value.
        BackendUnavailableError: the native backend was asked for, and cannot run here.
        TokenizerError: its vocabulary cannot be used.
    """
    refuse_keywords(removed)
    options = LoadOptions(exact, dtype, weights, activations, backend, max_context)
    with GGUFFile.open(path) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata, source=str(file.path))
        config, params = load_params(file, options, progress)
    return Model(config=config, params=params, tokenizer=tokenizer)


def load_params(
    file: GGUFFile,
    options: LoadOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ModelConfig, Params | EncoderParams]:
    """The config and parameters of an open file, without its tokenizer; see `load`."""
    options = options or LoadOptions()
    numerics = Numerics(options.exact, options.activations, resolve_backend(options.backend))
    weights = options.weights
    if weights == "auto":
        weights = "file" if numerics.native else options.dtype
    total = sum(info.n_bytes for info in file.tensors.values())
    tensors = ParamLoader(
        file, options.dtype, None if progress is None else lambda done: progress(done, total), weights=weights
    )
    family, config, frequencies = _configure(file, tensors, options.max_context)
    config = dataclasses.replace(config, dtype=options.dtype, numerics=numerics)
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
