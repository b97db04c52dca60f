"""Logits against llama.cpp, asked here and now: quantised files as float32, other prompts, other lengths.

llama.cpp quantises activations wherever weights are quantised, so it gets the dequantised weights (`gguf.quants`).
"""

import gguf
import numpy as np
import pytest

from oxjax import LLM
from oxjax.assets import embedded_draft, embedded_model
from tests.helpers.oracle import LlamaCpp
from tests.helpers.rewrite import rewrite

FILES = ["demo", "draft", "quants/llama-mix-Q4_K_M", "quants/llama-pure-IQ3_S", "archs/gemma3", "archs/qwen3"]
LENGTHS = [1, 2, 17, 130]


@pytest.mark.parametrize("name", FILES)
def test_logits_match_llama_cpp_on_dequantised_weights(request, report, tmp_path, name):
    if name in ("demo", "draft"):
        source = embedded_model() if name == "demo" else embedded_draft()
    else:
        source = request.getfixturevalue("data") / f"{name}.gguf"
    rewrite(source, tmp_path / "f32.gguf", gguf.GGMLQuantizationType.F32)
    rng = np.random.default_rng(0)
    with LLM(source, weights="float32", max_batch=len(LENGTHS)) as llm:
        prompts = [rng.integers(3, llm.config.vocab_size, n).tolist() for n in LENGTHS]
        ours = llm.logits(prompts)
    with LlamaCpp(tmp_path / "f32.gguf", vocab_only=False) as oracle:
        theirs = [oracle.logits(ids) for ids in prompts]
    error = max(float(np.abs(a - b).max() / b.std()) for a, b in zip(ours, theirs, strict=True))
    # float32 on both sides; gemma's GELU goes through llama.cpp's 16-bit table (see test_parity).
    allowed = 3e-3 if "gemma" in name else 1e-4
    report(f"llama.cpp on the float32 twin of {name}: {error:.1e} of the logits' std, allowed {allowed:.0e}")
    assert error <= allowed
