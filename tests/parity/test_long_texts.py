"""Logits of long texts against llama.cpp's, at every position: what grows with the length must not grow apart."""

import gguf
import numpy as np
import pytest

from tests.helpers.oracle import LlamaCpp
from tests.helpers.parity_loop import Loop, load, worst
from tests.helpers.rewrite import rewrite

DEFAULT, LONG = 4000, 8210
# Of the logits' standard deviation. An angle of 8,000 radians is a float32 number too, off by up to 5e-4, and llama.cpp
# blends the frequencies of YaRN in float32: 1.9e-4 and 0.8e-4 (with latents) were measured with it, 0.4e-4 elsewhere.
# Gemma's GELU is a 16-bit table in llama.cpp (see `test_parity`), whose errors add up to 2.8e-3.
ALLOWED = {"qwen3": 1e-4, "deepseek2_mla": 3e-4, "llama_yarn": 3e-4, "qwen35": 1e-4, "mamba2": 1e-4, "gemma3": 4e-3}
CASES = [("qwen3", DEFAULT), *(pytest.param(name, LONG, marks=pytest.mark.slow) for name in ALLOWED)]
ROWS = 128


@pytest.mark.parametrize(("name", "n"), CASES)
def test_long_texts_match_llama_cpp_at_every_position(data, tmp_path, report, name, n):
    path = rewrite(data / "archs" / f"{name}.gguf", tmp_path / "f32.gguf", gguf.GGMLQuantizationType.F32)
    ids = np.random.default_rng(5).integers(3, 500, n)
    with LlamaCpp(path, vocab_only=False) as oracle:
        expected = oracle.logits(ids.tolist())
    chunks = [ROWS] * (n // ROWS) + [n % ROWS]
    found = Loop(load(path)).logits(ids, chunks)
    errors = np.abs(found - expected).max(axis=1) / expected.std()
    at, error = int(errors.argmax()), worst(found, expected)
    report(
        f"parity of {n} tokens, {name}: worst {error:.1e} of the logits' std at position {at}, "
        f"median {np.median(errors):.1e}, allowed {ALLOWED[name]:.1e}"
    )
    assert error <= ALLOWED[name]
