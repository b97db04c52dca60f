"""Loading: what does not fit is refused with both numbers, and memory stays near the parameters'."""

import subprocess
import sys

import gguf
import jax
import numpy as np
import pytest

import oxjax
from oxjax.errors import GGUFError, ModelError, OxjaxError, UnsupportedArchitectureError
from oxjax.gguf import GGUFFile
from oxjax.info import describe
from oxjax.models.load import load_params

D, FF, HEADS, KV, VOCAB = 64, 96, 4, 2, 40

METADATA = {
    "llama.context_length": 128,
    "llama.embedding_length": D,
    "llama.block_count": 1,
    "llama.feed_forward_length": FF,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": VOCAB,
}
SHAPES = {
    "token_embd.weight": (VOCAB, D),
    "output_norm.weight": (D,),
    "blk.0.attn_norm.weight": (D,),
    "blk.0.attn_q.weight": (D, D),
    "blk.0.attn_k.weight": (D // 2, D),
    "blk.0.attn_v.weight": (D // 2, D),
    "blk.0.attn_output.weight": (D, D),
    "blk.0.ffn_norm.weight": (D,),
    "blk.0.ffn_gate.weight": (FF, D),
    "blk.0.ffn_up.weight": (FF, D),
    "blk.0.ffn_down.weight": (D, FF),
}


def write(path, metadata=None, shapes=None, arch="llama"):
    """A small model with the given changes; None as a value takes an entry out."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {**METADATA, **(metadata or {})}.items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    rng = np.random.default_rng(0)
    for name, shape in {**SHAPES, **(shapes or {})}.items():
        if shape is not None:
            writer.add_tensor(name, rng.standard_normal(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path):
    with GGUFFile.open(path) as file:
        return load_params(file)


def test_the_untouched_file_loads(tmp_path):
    config, params = load(write(tmp_path / "m.gguf"))
    assert (config.d_model, config.layers[0].mlp.d_ff, config.vocab_size, len(config.layers)) == (D, FF, VOCAB, 1)
    assert params.layers[0].mlp.down.weight.shape == (FF, D)
    assert params.output is None


def test_matrices_hold_the_files_numbers(tmp_path):
    path = write(tmp_path / "m.gguf")
    _, params = load(path)
    with GGUFFile.open(path) as file:
        np.testing.assert_array_equal(params.layers[0].mixers[0].k.weight, file.tensor("blk.0.attn_k.weight").T)
        np.testing.assert_array_equal(params.embedding, file.tensor("token_embd.weight"))


@pytest.mark.parametrize(
    "metadata,shapes,message",
    [
        ({"llama.feed_forward_length": 128}, {}, r"ffn_gate.weight.*\(96, 64\).*\(128, 64\)"),
        ({"llama.attention.head_count_kv": 4}, {}, r"attn_k.weight.*\(32, 64\).*\(64, 64\)"),
        ({"llama.attention.key_length": 32}, {}, r"attn_q.weight.*\(64, 64\).*\(128, 64\)"),
        ({"llama.embedding_length": 128}, {}, r"token_embd.weight.*\(40, 64\).*\(40, 128\)"),
        ({"llama.vocab_size": 41}, {}, r"token_embd.weight.*\(40, 64\).*\(41, 64\)"),
        ({"llama.block_count": 2}, {}, "blk.1.attn_q.weight.*missing"),
        ({"llama.block_count": 0}, {}, "block_count.*found 0"),
        (
            {"llama.attention.head_count": 8, "llama.attention.head_count_kv": 3},
            {},
            "head_count_kv: 3 does not divide head_count 8",
        ),
        ({"llama.attention.head_count": 0}, {}, "head_count.*found 0"),
        ({"llama.rope.dimension_count": 18}, {}, "found 18.*at most key_length 16"),
        ({"llama.rope.dimension_count": 7}, {}, "found 7, expected even"),
        ({"llama.rope.scaling.type": "su"}, {}, "'su' is not"),
        ({"llama.expert_count": 4, "llama.expert_used_count": 5}, {}, "expert_used_count: found 5 of expert_count 4"),
        ({"llama.expert_count": 4, "llama.expert_used_count": 2}, {}, "ffn_gate_exps.weight' is missing"),
        ({}, {"blk.0.ffn_down.weight": None}, "ffn_down.weight.*missing"),
        ({}, {"blk.0.attn_q.bias": (32,)}, r"attn_q.bias.*\(32,\).*\(64,\)"),
        ({}, {"rope_freqs.weight": (4,)}, r"rope_freqs.weight.*\(4,\).*\(8,\)"),
        ({}, {"blk.0.attn_sinks.weight": (4,)}, "no place in this architecture: blk.0.attn_sinks.weight"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_what_does_not_fit_is_refused_with_both_numbers(tmp_path, metadata, shapes, message):
    with pytest.raises(ModelError, match=message):
        load(write(tmp_path / "m.gguf", metadata, shapes))


@pytest.mark.parametrize("name", ["archs/llama", "archs/mixtral", "quants/llama-mix-Q4_K_M"])
def test_progress_comes_in_parts_and_ends_with_all_bytes(data, monkeypatch, name):
    """Of the tables too, which all threads share."""
    seen = []
    monkeypatch.setattr("oxjax.models.matrices._SLAB_BYTES", 1 << 14)
    oxjax.load(data / f"{name}.gguf", progress=lambda *done: seen.append(done))
    with GGUFFile.open(data / f"{name}.gguf") as file:
        total = sum(t.n_bytes for t in file.tensors.values())
        assert len(seen) > 2 * len(file.tensors)
    assert seen == sorted(seen)
    assert {whole for _, whole in seen} == {seen[-1][0]} == {total}


def test_missing_or_mistyped_metadata_names_the_key(tmp_path):
    with pytest.raises(GGUFError, match=r"llama\.embedding_length"):
        load(write(tmp_path / "a.gguf", {"llama.embedding_length": None}))
    with pytest.raises(GGUFError, match=r"llama\.feed_forward_length"):
        load(write(tmp_path / "b.gguf", {"llama.feed_forward_length": "many"}))


def test_head_dim_comes_from_its_key(tmp_path):
    shapes = {
        "blk.0.attn_q.weight": (4 * 32, D),
        "blk.0.attn_k.weight": (2 * 32, D),
        "blk.0.attn_v.weight": (2 * 8, D),
        "blk.0.attn_output.weight": (D, 4 * 8),
    }
    lengths = {"llama.attention.key_length": 32, "llama.attention.value_length": 8}
    config, _ = load(write(tmp_path / "m.gguf", lengths, shapes))
    assert (config.mixers[0].key_dim, config.mixers[0].value_dim, config.ropes[0].dim) == (32, 8, 32)


def test_learned_positions_bound_the_context(data):
    with pytest.raises(ModelError, match="512 positions were learned, but max_context is 513"):
        oxjax.load(data / "archs" / "gpt2.gguf", max_context=513)


def test_unknown_architecture_is_named(tmp_path):
    with pytest.raises(UnsupportedArchitectureError, match="'clip'"):
        load(write(tmp_path / "m.gguf", arch="clip"))


def test_unknown_dtype_is_named():
    with pytest.raises(OxjaxError, match="float16"):
        oxjax.load("x.gguf", dtype="float16")


MEASURE = """
import re, sys
from oxjax.gguf import GGUFFile
from oxjax.models.load import load_params
import jax
jax.device_put(0).block_until_ready()
def memory(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = memory("VmRSS")
with GGUFFile.open(sys.argv[1]) as file:
    config, params = load_params(file)
total = sum(a.nbytes for a in jax.tree.leaves(params))
print(total, memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_loading_needs_little_more_than_the_parameters(tmp_path, report):
    """Peak resident memory, mapped file pages included, of a 96 MB F32 model in a process of its own."""
    wide = {"llama.embedding_length": 512, "llama.feed_forward_length": 1536, "llama.vocab_size": 8000}
    shapes = {n: tuple({D: 512, D // 2: 256, FF: 1536, VOCAB: 8000}[d] for d in s) for n, s in SHAPES.items()}
    layers = {n.replace("blk.0", f"blk.{i}"): s for n, s in shapes.items() for i in range(6)}
    path = write(tmp_path / "m.gguf", {**wide, "llama.block_count": 6}, layers)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], check=True, capture_output=True, text=True)
    total, grown = map(int, done.stdout.split())
    report(f"loading {total / 1e6:.0f} MB of parameters raised peak memory by {grown / 1e6:.0f} MB")
    assert total > 90e6
    # A thread holds the mapped pages of the tensor it reads (3 MB here), a slab of it decoded, and one turned around.
    assert grown <= total + 2 * 12e6


@pytest.mark.parametrize("name", ["quants/gptoss-MXFP4_MOE", "quants/llama-mix-Q4_K_M", "archs/mixtral"])
def test_info_knows_what_the_parameters_take(data, name):
    with GGUFFile.open(data / f"{name}.gguf") as file:
        _, params = load_params(file)
    told = describe(data / f"{name}.gguf")["memory"]["parameters"]
    held = sum(a.nbytes for a in jax.tree.leaves(params))
    assert abs(told - held) <= 1e-3 * held  # rotation frequencies are not in the file
