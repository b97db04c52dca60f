"""Write a GGUF of a real model's shape with random weights, to measure speed on a size nobody needs to download.

python -m benchmarks.random_model OUT.gguf [--shape qwen3-0.6b] [--type Q4_K_M] [--layers 28]

The K types are made by llama.cpp's quantiser, with its choice of types for each tensor.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np

PLAIN_TYPES = ("F32", "F16", "Q8_0", "Q4_0")
K_TYPES = ("Q4_K_M", "Q5_K_M", "Q6_K")


@dataclass(frozen=True)
class Shape:
    """The sizes of a model whose output matrix is its embedding."""

    architecture: str
    layers: int
    d_model: int
    d_ff: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rope_theta: float
    pre_tokenizer: str


SHAPES = {
    "qwen3-0.6b": Shape("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, 1e6, "qwen2"),
    "llama-3.2-1b": Shape("llama", 16, 2048, 8192, 32, 8, 64, 128256, 5e5, "llama-bpe"),
    "tiny": Shape("qwen3", 2, 256, 512, 4, 2, 64, 512, 1e6, "qwen2"),  # for tests of what measures
}


def write(path: str | Path, shape: Shape, kind: str) -> None:
    """Write a model.

    Args:
        path: of the file.
        shape: of the model.
        kind: one of `PLAIN_TYPES`, or of `K_TYPES`, for which llama.cpp's binding must be there.
    """
    if kind in PLAIN_TYPES:
        _write_plain(path, shape, gguf.GGMLQuantizationType[kind])
        return
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
        source = Path(folder) / "f16.gguf"
        _write_plain(source, shape, gguf.GGMLQuantizationType.F16)
        quantize(source, path, kind)


# In a process of its own, which the binding may crash when it ends.
_QUANTIZE = """
import ctypes, os, sys
import llama_cpp
source, target, kind = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
params.allow_requantize = True
status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
os._exit(1 if status else 0)
"""


def quantize(source: str | Path, target: str | Path, kind: str) -> None:
    """Write a file's weights in a mix of types of llama.cpp's, such as Q4_K_M.

    Raises:
        RuntimeError: llama.cpp refused.
    """
    command = [sys.executable, "-c", _QUANTIZE, str(source), str(target), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"llama.cpp's quantiser failed for {kind}: {done.stderr[-500:]}")


def _write_plain(path: str | Path, shape: Shape, kind: gguf.GGMLQuantizationType) -> None:
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), shape.architecture)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.d_model)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.d_ff)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(shape.pre_tokenizer)
    writer.add_token_list([f"t{i}" for i in range(shape.vocab)])
    writer.add_token_merges(["t 0"])

    def matrix(name: str, rows: int, columns: int) -> None:
        numbers = rng.standard_normal((rows, columns), np.float32) / np.float32(np.sqrt(columns))
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(numbers, kind), raw_dtype=kind)

    d, q_dim, kv_dim = shape.d_model, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = {"attn_norm": d, "ffn_norm": d}
    if shape.architecture == "qwen3":
        norms |= {"attn_q_norm": shape.head_dim, "attn_k_norm": shape.head_dim}
    matrix("token_embd", shape.vocab, d)
    writer.add_tensor("output_norm.weight", np.ones(d, np.float32))
    for i in range(shape.layers):
        for name, n in norms.items():
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(n, np.float32))
        matrix(f"blk.{i}.attn_q", q_dim, d)
        matrix(f"blk.{i}.attn_k", kv_dim, d)
        matrix(f"blk.{i}.attn_v", kv_dim, d)
        matrix(f"blk.{i}.attn_output", d, q_dim)
        matrix(f"blk.{i}.ffn_gate", shape.d_ff, d)
        matrix(f"blk.{i}.ffn_up", shape.d_ff, d)
        matrix(f"blk.{i}.ffn_down", d, shape.d_ff)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--shape", default="qwen3-0.6b", choices=SHAPES)
    parser.add_argument("--type", default="Q8_0", choices=PLAIN_TYPES + K_TYPES)
    parser.add_argument("--layers", type=int, help="instead of the shape's")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    write(options.out, shape if options.layers is None else replace(shape, layers=options.layers), options.type)


if __name__ == "__main__":
    main()
