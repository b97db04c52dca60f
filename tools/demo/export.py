"""A demo model and its tokenizer as one GGUF file: matrices Q8_0, norms F32."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
from gguf import quants
from tokenizers import Tokenizer

from . import model
from .train import END

Q8_0 = gguf.GGMLQuantizationType.Q8_0


def write(
    path: Path, params: model.Params, shape: model.Shape, tokenizer: Tokenizer, name: str, description: str
) -> model.Params:
    """Write the file; return the weights as a reader will see them, that is after quantisation."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_name(name)
    writer.add_description(description)
    writer.add_license("Apache-2.0")
    writer.add_languages(["en"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.d_model)
    writer.add_block_count(shape.n_layers)
    writer.add_feed_forward_length(shape.d_ff)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_vocab_size(shape.vocab)
    _add_tokenizer(writer, tokenizer)
    seen = {}
    for tensor, weight in params.items():
        array = np.asarray(weight, np.float32)
        if array.ndim == 1:
            writer.add_tensor(tensor, array)
            seen[tensor] = weight
        else:
            packed = quants.quantize(array, Q8_0)
            writer.add_tensor(tensor, packed, raw_dtype=Q8_0)
            seen[tensor] = jnp.asarray(quants.dequantize(packed, Q8_0))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return seen


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    bpe = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    end = tokenizer.token_to_id(END)
    kinds = [gguf.TokenType.CONTROL if i == end else gguf.TokenType.NORMAL for i in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
