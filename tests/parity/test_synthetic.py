"""Logits against llama.cpp on random files of every transformer architecture, with every key that changes something.

The files of `test_parity` have one set of hyper-parameters each; here they are swept. A case that differs from
another by metadata alone must also change llama.cpp's answer, so that a key which both sides ignored would show.
"""

import jax
import numpy as np
import pytest

from oxjax.models.base import replace_attention
from tests.helpers.oracle import LlamaCpp
from tests.helpers.parity_loop import Loop, load, worst
from tests.helpers.sweep import sweep
from tests.helpers.synth import RECIPES, write

# Of the logits' standard deviation. float32 rounding; or ggml's 16-bit GELU table, where there is GELU.
# Through 40 random layers rounding grows: our own chunkings then differ among themselves by 1e-4.
CLOSE, GELU, DEEP = 1e-4, 3e-3, 3e-4
WITH_GELU = {
    *(
        "bloom",
        "codeshell",
        "falcon",
        "gemma",
        "gemma2",
        "gemma3",
        "gpt2",
        "gptneox",
        "grok",
        "mpt",
        "phi2",
        "starcoder",
        "starcoder2",
    ),
}
# Architectures that `test_parity` has files of run here in the sweep only.
BASIC = ["arcee", "baichuan", "bloom", "codeshell", "exaone", "exaone4", "glm4", "internlm2", "minicpm", "mistral3"]
BASIC += ["bailingmoe2", "dbrx", "deepseek", "ernie4_5-moe", "glm4moe", "granitemoe", "grok", "llama4", "minicpm3"]
BASIC += [
    "minimax-m2",
    "olmoe",
    "phimoe",
    "mpt",
    "nemotron",
    "olmo",
    "orion",
    "qwen",
    "seed_oss",
    "smollm3",
    "stablelm",
    "xverse",
]
# By default in fast mode, but for these: exact mode takes twice as long to compile.
EXACT = ["exaone4", "glm4moe", "llama4", "minicpm3", "mpt", "orion"]
QUICK = [
    "olmo2: window",
    "mistral3: temperature",
    "mistral3: log multiplier",
    "stablelm: 12B",
    "mpt: everything",
    "granite: no rotation",
    "deepseek2: old, full rank, yarn",
    "deepseek2: groups",
    "qwen3moe: five used",
    "grok: Grok 2",
]
SWEEP = sweep()
CHUNKS = [32, 32]  # one shape to compile, and a past to attend to
IDS = np.random.default_rng(1).integers(3, 500, sum(CHUNKS))


@pytest.fixture(scope="module")
def theirs(data, tmp_path_factory):
    """Answers of llama.cpp to a recipe, and the file."""
    folder, known = tmp_path_factory.mktemp("synth"), {}

    def ask(recipe):
        key = repr(recipe)
        if key not in known:
            path = write(folder / f"{len(known)}.gguf", recipe, data / "archs" / "llama.gguf")
            with LlamaCpp(path, vocab_only=False) as oracle:
                known[key] = path, oracle.logits(IDS.tolist())
        return known[key]

    return ask


def compare(recipe, theirs, report, name, *, exact):
    path, expected = theirs(recipe)
    error = worst(Loop(load(path, exact=exact)).logits(IDS, CHUNKS), expected)
    allowed = GELU if recipe.arch in WITH_GELU else DEEP if recipe.layers >= 32 else CLOSE
    report(f"parity {recipe.arch} (random, {name}): {error:.1e} of the logits' std, allowed {allowed:.0e}")
    assert error <= allowed
    return expected, allowed


MODES = [
    pytest.param(
        arch, exact, marks=() if arch in BASIC and exact == (arch in EXACT) else pytest.mark.slow, id=f"{arch}-{mode}"
    )
    for arch in RECIPES
    for exact, mode in ((True, "exact"), (False, "fast"))
]


@pytest.mark.parametrize(("arch", "exact"), MODES)
def test_architecture(arch, exact, theirs, report):
    compare(RECIPES[arch], theirs, report, arch, exact=exact)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in SWEEP])
def test_variant(name, theirs, report):
    recipe, base = SWEEP[name]
    expected, allowed = compare(recipe, theirs, report, name, exact=False)  # which compiles in half the time
    if base is not None:
        assert worst(theirs(base)[1], expected) > 3 * allowed
    jax.clear_caches()


LAWFUL = ["bloom", "mistral3: temperature", "mpt: everything", "olmo"]
LAWFUL_MIXTURES = ["deepseek2: temperature", "glm4moe: groups", "gpt-oss", "grok: Grok 2", "llama4", "minicpm3"]


@pytest.mark.parametrize("name", LAWFUL + [pytest.param(n, marks=pytest.mark.slow) for n in LAWFUL_MIXTURES])
def test_bits_do_not_depend_on_chunks(name, theirs):
    """ALiBi, growing queries, clamps, norms without weights, and experts keep the law."""
    path, _ = theirs(SWEEP[name][0] if name in SWEEP else RECIPES[name])
    loop = Loop(load(path))
    whole = loop.logits(IDS, [64])
    for chunks in (CHUNKS, [1] * 64, [7] * 9 + [1]):
        np.testing.assert_array_equal(loop.logits(IDS, chunks), whole)


@pytest.mark.slow
def test_llama4_beyond_its_chunk(data, tmp_path, report):
    """No key of its files states the chunk of 8,192 tokens, nor when queries grow, so a text has to be that long."""
    recipe = RECIPES["llama4"].but({"context_length": 16384}, heads=2, kv_heads=1, d_model=32)
    path = write(tmp_path / "long.gguf", recipe, data / "archs" / "llama.gguf")
    ids = np.random.default_rng(2).integers(3, 500, 8192 + 64)
    with LlamaCpp(path, vocab_only=False) as oracle:
        expected = oracle.logits(ids.tolist())
    model = load(path, exact=False)
    cuts = [128] * (len(ids) // 128) + [len(ids) % 128]
    allowed = 3 * CLOSE  # angles of thousands of radians are float32 numbers too
    error = worst(Loop(model).logits(ids, cuts), expected)
    report(f"llama4 over {len(ids)} tokens: {error:.1e} of the logits' std, allowed {allowed:.0e}")
    assert error <= allowed
    for change in ({"chunk": None}, {"temperature": None}):
        config = replace_attention(model.config, [change] * len(model.config.layers))
        other = Loop(model.replace(config=config)).logits(ids, cuts)
        assert worst(other[:8191], expected[:8191]) <= allowed
        assert worst(other[8191:], expected[8191:]) > 3 * allowed
