"""The embedded models: what the files hold, and that the recipe makes such files."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "oxjax" / "assets"
MODELS = ("demo.gguf", "demo-draft.gguf")


@pytest.fixture(scope="module")
def corpus():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from demo import corpus

        yield corpus
    finally:
        sys.path.remove(str(ROOT / "tools"))


def check_files(folder: Path) -> None:
    """Small, complete, Q8_0 and F32 only, one tokenizer."""
    paths = [folder / name for name in MODELS]
    assert sum(p.stat().st_size for p in paths) <= 3_000_000
    for path in paths:
        reader = GGUFReader(path)
        assert reader.fields["general.architecture"].contents() == "llama"
        assert reader.fields["general.license"].contents() == "Apache-2.0"
        assert reader.fields["llama.context_length"].contents() == 512
        assert {t.tensor_type.name for t in reader.tensors} == {"Q8_0", "F32"}
        assert all(int(t.shape[0]) % 32 == 0 for t in reader.tensors)
        assert "output.weight" not in {t.name for t in reader.tensors}
        embedding = next(t for t in reader.tensors if t.name == "token_embd.weight")
        assert int(embedding.shape[1]) == reader.fields["llama.vocab_size"].contents()
        assert int(embedding.shape[1]) == len(reader.fields["tokenizer.ggml.tokens"].contents())
    tokenizers = [
        {k: f.contents() for k, f in GGUFReader(p).fields.items() if k.startswith("tokenizer.")} for p in paths
    ]
    assert tokenizers[0] == tokenizers[1]
    assert tokenizers[0]["tokenizer.ggml.tokens"][tokenizers[0]["tokenizer.ggml.bos_token_id"]] == "<|endoftext|>"


def test_the_embedded_models_are_small_and_share_a_tokenizer():
    check_files(ASSETS)


def test_the_card_has_the_licence_and_the_numbers():
    card = (ASSETS / "README.md").read_text("utf-8")
    for word in ("Apache-2.0", "held-out", "trigram", *MODELS):
        assert word in card


def test_a_story_is_a_function_of_its_seed(corpus):
    assert [corpus.story(n) for n in range(50)] == [corpus.story(n) for n in range(50)]
    assert len({corpus.story(n) for n in range(500)}) == 500


def test_stories_are_whole_and_use_their_slots(corpus):
    for seed in range(1000):
        text = corpus.story(seed)
        assert 60 < len(text.split()) < 260
        assert not set("{}[]%|") & set(text)
        assert text == text.strip() and text[-1] in '.!?"'


def test_held_out_stories_are_not_training_stories(corpus):
    train, held_out = corpus.split(3000, 300)
    assert len(held_out) == 300 and len(train) > 2900
    assert not set(train) & set(held_out)
    assert corpus.split(10, 300)[1] == held_out


def test_copies_of_held_out_stories_are_dropped_from_training(corpus, monkeypatch):
    monkeypatch.setattr(corpus, "story", lambda seed: f"story {seed % 7}")
    train, held_out = corpus.split(100, 3)
    assert held_out == ["story 0", "story 1", "story 2"]
    assert set(train) == {f"story {n}" for n in range(3, 7)}


def test_trigrams_predict_a_pattern_that_unigrams_cannot(corpus):
    from demo.ngram import NGram

    story = np.array([0, *[1, 2, 3] * 20, 0])
    unigram, trigram = NGram([story] * 50, [story], 4).losses([story])
    assert unigram > 1
    assert trigram < 0.1


@pytest.mark.slow
def test_the_recipe_runs_from_nothing(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "train_demo.py")]
    flags = ["--steps", "4", "--stories", "400", "--out", str(tmp_path)]
    subprocess.run(command + flags, check=True, capture_output=True, timeout=600)
    check_files(tmp_path)
    assert "held-out" in (tmp_path / "README.md").read_text("utf-8")
