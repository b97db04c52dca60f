"""The real vocabularies: published pairs, hard strings, and llama.cpp on random text."""

import json
import random

import numpy as np
import pytest

from oxjax.tokenizer.detokenizer import clean_spaces
from tests.helpers.data import DATA, data_files
from tests.helpers.oracle import LlamaCpp
from tests.helpers.synthetic_vocab import load, random_text, random_texts

VOCABULARIES = [*data_files("vocab/*.gguf"), *data_files("models/*/*.gguf")]
# The same vocabulary serves all small architectures.
FEW = [*VOCABULARIES, *data_files("archs/llama.gguf")]


@pytest.mark.parametrize("path", data_files("vocab/*.gguf.inp"))
def test_published_pairs(data, path):
    t = load(path.with_suffix(""))
    texts = path.read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = path.with_suffix(".out").read_text(encoding="utf-8").split("\n")
    # The last line has its end, except where the last text is empty and its line is what follows that end.
    expected = expected[: len(texts)] + expected[len(texts) + 1 :]
    assert len(texts) > 40
    for text, line in zip(texts, expected, strict=True):
        assert t.encode(text, add_special=False, parse_special=False) == list(map(int, line.split())), text


@pytest.mark.parametrize("path", data_files("vocab/*.gguf"))
def test_hard_strings(data, path):
    t = load(path)
    for case in json.loads((DATA / "vocab/extra.json").read_text(encoding="utf-8"))[path.name]:
        assert t.encode(case["text"]) == case["special"], case["text"]
        assert t.encode(case["text"], add_special=False, parse_special=False) == case["plain"], case["text"]
        assert t.decode(case["plain"]) == case["detok"], case["text"]


def agree(path, texts):
    t = load(path)
    with LlamaCpp(path) as oracle:
        for special in (True, False):
            expected = oracle.tokenize_all(texts, special, special)
            for text, ids in zip(texts, expected, strict=True):
                assert t.encode(text, special, special) == ids, text
            for ids, data in zip(expected, oracle.detokenize_all(expected), strict=True):
                assert t.decode(ids) == data.decode("utf-8", "replace")
        rng = random.Random(3)
        lists = [[rng.randrange(t.vocab_size) for _ in range(rng.randint(0, 12))] for _ in texts]
        for ids, data in zip(lists, oracle.detokenize_all(lists), strict=True):
            assert t.decode(ids) == data.decode("utf-8", "replace"), ids


@pytest.mark.parametrize("path", FEW)
def test_agrees_with_llama_cpp(data, path):
    agree(path, random_texts(1, 300))


@pytest.mark.slow
@pytest.mark.parametrize("path", FEW)
def test_agrees_with_llama_cpp_at_length(data, path):
    agree(path, random_texts(2, 5_000))


@pytest.mark.slow
@pytest.mark.parametrize("path", FEW)
def test_agrees_with_llama_cpp_on_long_texts(data, path):
    rng = random.Random(4)
    agree(path, ["".join(random_text(rng) for _ in range(40)) for _ in range(50)])


@pytest.mark.parametrize("path", VOCABULARIES)
def test_pieces_and_special_ids_are_llama_cpps(data, path):
    t = load(path)
    with LlamaCpp(path) as oracle:
        assert list(t.vocab_bytes()) == oracle.pieces()
        found = oracle.special()
    for name in ("bos", "eos", "sep", "pad"):
        ours = getattr(t, f"{name}_id")
        assert (-1 if ours is None else ours) == found[name], name
    assert (t.add_bos, t.add_eos, t.add_sep) == (found["add_bos"], found["add_eos"], found["add_sep"])
    assert t.eog_ids == frozenset(found["eog"])


@pytest.mark.parametrize("path", VOCABULARIES)
def test_round_trip(data, path):
    t = load(path)
    if t.model in ("bert", "t5"):
        pytest.skip("normalises: the text is not kept")
    texts = random_texts(5, 300)
    single = {piece for piece in t.vocab_bytes() if len(piece) == 1}
    for text in texts:
        ids = t.encode(text, add_special=False, parse_special=False)
        data = b"".join(map(t.token_bytes, ids))
        # Some vocabularies lack bytes (starcoder: 0xF1); such characters are dropped, by llama.cpp too.
        if t.model != "gpt2" or all(bytes([b]) in single for b in text.encode()):
            assert data == (b" " * t.add_space_prefix + text.encode() if text else b"")
            assert t.decode(ids) == (clean_spaces(text) if t._vocab.clean_spaces else text)
    assert t.encode_batch(texts[:5]) == [t.encode(text) for text in texts[:5]]


@pytest.mark.parametrize("path", data_files("vocab/*.gguf"))
def test_ids_may_be_numpy(data, path):
    t = load(path)
    ids = np.array(t.encode("Hello world", add_special=False), np.int32)
    assert t.decode(ids) == t.decode(ids.tolist())
    stream = t.detokenizer()
    assert "".join([*(stream.push(int(i)) for i in ids), stream.flush()]) == t.decode(ids)


def test_stories_generation(data):
    t = load(DATA / "models/stories260K/stories260K.gguf")
    for case in json.loads((DATA / "models/stories260K/greedy.json").read_text(encoding="utf-8")):
        assert t.encode(case["prompt"]) == case["prompt_ids"]
        assert t.decode(case["token_ids"]) == case["text"]
        whole = t.decode([*case["prompt_ids"], *case["token_ids"]], skip_special=True)
        assert whole == case["prompt"] + t.decode(case["token_ids"], continues=True) or case["prompt"] == ""
