"""Embeddings against llama.cpp's: reference files, random encoders of every architecture, and decoders."""

import jax
import numpy as np
import pytest

from oxjax import LLM
from oxjax.models.layers import mlp
from tests.helpers.encoder_synth import ENCODERS
from tests.helpers.oracle import LlamaCpp
from tests.helpers.parity_loop import gelu_by_table, worst
from tests.helpers.synth import RECIPES, write

# Of the hidden states' standard deviation: float32 rounding, which sharp softmaxes over 180 random keys amplify (T5's
# scores have no scale), or ggml's 16-bit GELU table, which test_parity has more about.
CLOSE, GELU = 2e-4, 6e-3
QUICK = ["bert", "nomic-bert", "jina-bert-v2: code", "jina-bert-v2: fused gate", "modern-bert", "t5encoder"]
QUICK += ["nomic-bert-moe", "t5"]
IDS = np.random.default_rng(1).integers(1000, 30000, 180).tolist()  # past one block of keys, and past T5's last bucket
POOLINGS = ["none", "mean", "cls", "last"]


@pytest.mark.parametrize(("name", "arch", "allowed"), [("bert", "bert", 2e-3), ("nomicbert", "nomic-bert", 1e-4)])
def test_reference_files(data, report, name, arch, allowed):
    reference = np.load(data / "archs" / "reference.npz")
    ids = reference[f"{name}__ids"].tolist()
    with LLM(data / "archs" / f"{name}.gguf", weights="float32") as llm:
        (tokens,), (pooled,) = (llm.embed([ids], p, normalize=False) for p in ("none", None))
    errors = worst(tokens, reference[f"{name}__tok"]), worst(pooled, reference[name])
    shown = f"{errors[0]:.1e} by token, {errors[1]:.1e} pooled"
    report(f"parity {arch} ({name}.gguf): {shown} of the hidden states' std, allowed {allowed:.0e}")
    assert max(errors) <= allowed


@pytest.fixture(scope="module")
def theirs(data, tmp_path_factory):
    """A file of a recipe, and llama.cpp's hidden states."""
    folder, known = tmp_path_factory.mktemp("encoders"), {}

    def ask(recipe):
        key = repr(recipe)
        if key not in known:
            path = write(folder / f"{len(known)}.gguf", recipe, data / "archs" / "bert.gguf")
            with LlamaCpp(path, vocab_only=False) as oracle:
                known[key] = path, oracle.embeddings(IDS, "none")
        return known[key]

    return ask


def differences(path, expected):
    """The largest in each row, of the standard deviation."""
    with LLM(path, exact=False) as llm:
        tokens = llm.embed([IDS], "none", normalize=False)[0]
    return np.abs(tokens - expected).max(axis=1) / expected.std()


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ENCODERS])
def test_random_encoders(theirs, report, monkeypatch, name):
    recipe, base = ENCODERS[name]
    path, expected = theirs(recipe)
    gelu = recipe.activation == "gelu"
    allowed = GELU if gelu else CLOSE
    rows = differences(path, expected)
    error = rows.max()
    report(f"parity {recipe.arch} (random, {name}): {error:.1e} of the hidden states' std, allowed {allowed:.0e}")
    assert error <= allowed
    if gelu:
        monkeypatch.setitem(mlp.ACTIVATIONS, "gelu", gelu_by_table)
        jax.clear_caches()
        tabled = differences(path, expected)
        report(f"random {name}: median {np.median(rows):.1e}, with a 16-bit table {np.median(tabled):.1e}")
        # The deeper, the more inputs fall to another side of a 16-bit rounding than llama.cpp's.
        close = CLOSE * recipe.layers / 2
        assert np.median(tabled) <= close < np.median(rows)
    if base is not None:
        assert worst(theirs(base)[1], expected) > 3 * allowed
    jax.clear_caches()


@pytest.mark.parametrize("name", ["qwen3", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "granite"))])
def test_decoders(data, tmp_path, report, name):
    """Hidden states of causal models, in chunks, with every pooling that llama.cpp has."""
    ids = np.random.default_rng(1).integers(3, 500, 150).tolist()
    path = write(tmp_path / "m.gguf", RECIPES[name], data / "archs" / "llama.gguf")
    with LLM(path, exact=False, max_batch=2) as llm:
        llm.engine.scheduler.max_rows = 64
        ours = {p: llm.embed([ids], p, normalize=False)[0] for p in POOLINGS}
    with LlamaCpp(path, vocab_only=False) as oracle:
        errors = {p: worst(ours[p], oracle.embeddings(ids, p)) for p in POOLINGS}
    report(f"hidden states of {name}: {max(errors.values()):.1e} of their std, allowed {CLOSE:.0e}")
    assert max(errors.values()) <= CLOSE


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling_of_an_encoder(theirs, pooling):
    path, _ = theirs(ENCODERS["nomic-bert"][0])
    with LlamaCpp(path, vocab_only=False) as oracle, LLM(path, exact=False) as llm:
        assert worst(llm.embed([IDS], pooling, normalize=False)[0], oracle.embeddings(IDS, pooling)) <= CLOSE


@pytest.mark.parametrize(
    "name",
    [
        "modern-bert",
        "t5encoder",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("jina-bert-v2: code", "nomic-bert-moe")),
    ],
)
def test_bits_do_not_depend_on_company(data, tmp_path, name):
    """ALiBi, windows to both sides, biases by distance and experts keep the law; see tests/law/test_embed_law.py."""
    path = write(tmp_path / "m.gguf", ENCODERS[name][0], data / "archs" / "bert.gguf")
    texts = [IDS[:n] for n in (1, 33, 180, 2, 130)]
    with LLM(path, max_rows=512) as llm:
        alone = [llm.embed([ids], "none")[0] for ids in texts]
        for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
            found = llm.embed([texts[i] for i in order], "none")
            for i, tokens in zip(order, found, strict=True):
                np.testing.assert_array_equal(tokens, alone[i])
