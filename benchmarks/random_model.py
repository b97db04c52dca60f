"""Write a qwen3-shaped GGUF with random weights, to measure speed on a size nobody needs to download.

python benchmarks/random_model.py OUT.gguf [--layers 28] [--type Q8_0]
"""

import argparse

import gguf
import numpy as np

D, FF, HEADS, KV, HEAD_DIM, VOCAB = 1024, 3072, 16, 8, 128, 151936  # Qwen3-0.6B


def write(path: str, layers: int, kind: gguf.GGMLQuantizationType) -> None:
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_context_length(4096)
    writer.add_embedding_length(D)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    writer.add_token_merges(["t 0"])

    def matrix(name: str, rows: int, columns: int) -> None:
        numbers = rng.standard_normal((rows, columns), np.float32) / np.float32(np.sqrt(columns))
        writer.add_tensor(name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)

    matrix("token_embd.weight", VOCAB, D)
    writer.add_tensor("output_norm.weight", np.ones(D, np.float32))
    for i in range(layers):
        prefix = f"blk.{i}."
        for name, n in {"attn_norm": D, "ffn_norm": D, "attn_q_norm": HEAD_DIM, "attn_k_norm": HEAD_DIM}.items():
            writer.add_tensor(f"{prefix}{name}.weight", np.ones(n, np.float32))
        matrix(f"{prefix}attn_q.weight", HEADS * HEAD_DIM, D)
        matrix(f"{prefix}attn_k.weight", KV * HEAD_DIM, D)
        matrix(f"{prefix}attn_v.weight", KV * HEAD_DIM, D)
        matrix(f"{prefix}attn_output.weight", D, HEADS * HEAD_DIM)
        matrix(f"{prefix}ffn_gate.weight", FF, D)
        matrix(f"{prefix}ffn_up.weight", FF, D)
        matrix(f"{prefix}ffn_down.weight", D, FF)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--type", default="Q8_0", choices=["F32", "F16", "Q8_0", "Q4_0"])
    options = parser.parse_args()
    write(options.out, options.layers, gguf.GGMLQuantizationType[options.type])
