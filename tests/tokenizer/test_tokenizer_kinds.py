"""Each kind of vocabulary on small ones made here: known answers, and llama.cpp where it is installed."""

import random

import numpy as np
import pytest

from oxjax.errors import TokenizerError
from oxjax.tokenizer import Tokenizer
from tests.helpers.oracle import LlamaCpp
from tests.helpers.synthetic_vocab import (
    BYTE,
    BYTES,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    metadata,
    pair_vocabulary,
    random_texts,
    write_gguf,
)  # fmt: skip


def spm(seed: int = 0, **keys) -> dict:
    """Random pieces with many equal scores, some letters without a token of their own, spaces inside pieces."""
    rng = random.Random(seed)
    letters = "abcde▁'.你é"
    pieces = list(dict.fromkeys("".join(rng.choice(letters) for _ in range(rng.randint(1, 5))) for _ in range(150)))
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *(p for p in pieces if p != "d"), "[USER]", "  "]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(tokens) - 261) + [USER_DEFINED] * 2
    scores = np.array([float(-rng.randint(0, 9)) for _ in tokens], np.float32)
    return metadata("llama", tokens, types=types, scores=scores, **keys)


def unigram(**keys) -> dict:
    rng = random.Random(2)
    letters = "abcde▁.你"
    pieces = list(dict.fromkeys("".join(rng.choice(letters) for _ in range(rng.randint(1, 4))) for _ in range(120)))
    tokens = ["<pad>", "</s>", "<unk>", *pieces, "<extra>", "zz"]
    types = [CONTROL, CONTROL, UNKNOWN] + [NORMAL] * len(pieces) + [USER_DEFINED, UNUSED]
    scores = np.array([-rng.random() * 10 for _ in tokens], np.float32)
    return metadata("t5", tokens, types=types, scores=scores, **keys)


def wordpiece(**keys) -> dict:
    pieces = [
        "▁" + w for w in ("the", "hello", "World", "cafe", "café", "don", "'", ".", "!", "你", "ᄋ", "1", "a", "fo")
    ]
    tail = ["s", "t", "obar", "23", "1", "é", "e", "world", "o", "n", "B", "ar"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *tail]
    ids = {"unknown_token_id": 1, "bos_token_id": 2, "seperator_token_id": 3, "padding_token_id": 0}
    types = [CONTROL] * 5 + [NORMAL] * (len(tokens) - 5)
    return metadata("bert", tokens, types=types, **ids, **keys)


def rwkv() -> dict:
    tokens = ["<s>", *(f"\\x{b:02x}" for b in range(256)), "hello", "\\n\\n", "he", "llo", "\\'s", "\\xe4\\xbd"]
    return metadata("rwkv", tokens)


def plamo2() -> dict:
    rng = random.Random(4)
    pieces = list(dict.fromkeys("".join(rng.choice("abcde 你") for _ in range(rng.randint(1, 4))) for _ in range(90)))
    tokens = ["<|plamo:unk|>", "<|plamo:bos|>", "<|plamo:eos|>", "<|plamo:pad|>", *BYTES, *pieces]
    types = [UNKNOWN, CONTROL, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces)
    scores = np.array([round(-rng.random() * 5, 1) for _ in tokens], np.float32)
    return metadata("plamo2", tokens, types=types, scores=scores)


def dna() -> dict:
    tokens, merges = pair_vocabulary()
    kmers = [f"{a}{b}{c}CGT\ue000" for a in "ACGT" for b in "ACGT" for c in "ACGT"]
    return metadata("hybriddna", [*tokens, "<dna>", "</dna>", "<oov>", *kmers], pre="qwen2", merges=merges)


KINDS = {
    **{f"spm-{seed}": (spm, {"seed": seed}) for seed in range(4)},
    "spm-plain": (spm, {"add_space_prefix": False, "add_bos_token": False, "add_eos_token": True}),
    "unigram": (unigram, {}),
    "unigram-prefix": (unigram, {"add_space_prefix": True}),
    "unigram-merge": (unigram, {"add_space_prefix": True, "remove_extra_whitespaces": True}),
    "wordpiece": (wordpiece, {}),
    "wordpiece-cased": (wordpiece, {"normalizer.lowercase": False}),
    "wordpiece-accents": (wordpiece, {"normalizer.strip_accents": False}),
    "rwkv": (rwkv, {}),
    "plamo2": (plamo2, {}),
    "hybriddna": (dna, {}),
}


SLOW = {"spm-1", "spm-2", "spm-3"}  # other random vocabularies


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in KINDS])
def test_agrees_with_llama_cpp(name, tmp_path):
    make, arguments = KINDS[name]
    keys = make(**arguments)
    t = Tokenizer.from_metadata(keys, name)
    rng = random.Random(9)
    texts = random_texts(10, 150)
    alphabet = "abcde  .'你éz\n<>[USER]"
    texts += ["".join(rng.choice(alphabet) for _ in range(rng.randint(1, 30))) for _ in range(400)]
    texts += [
        f"a{x}b  {x} c" for x in ("<s>", "</s>", "[USER]", "<extra>", "[MASK]", "<dna>acgtcgNNN</dna>", "<dna>aacg")
    ]
    with LlamaCpp(write_gguf(tmp_path / "vocab.gguf", keys)) as oracle:
        for special in (True, False):
            expected = oracle.tokenize_all(texts, special, special)
            for text, ids, data in zip(texts, expected, oracle.detokenize_all(expected), strict=True):
                assert t.encode(text, special, special) == ids, text
                assert t.decode(ids) == data.decode("utf-8", "replace"), ids
        assert list(t.vocab_bytes()) == oracle.pieces()
        assert t.eog_ids == frozenset(oracle.special()["eog"])


def test_spm_merges_the_best_pair_and_the_leftmost_of_equals():
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "c", "ab", "bc", "aa"]
    scores = np.array([0, 0, 0, -9, -9, -9, -2, -1, -3], np.float32)
    t = Tokenizer.from_metadata(metadata("llama", tokens, scores=scores, add_space_prefix=False))
    texts = [t.token_text(i) for i in t.encode("abcaaa", add_special=False)]
    assert texts == ["a", "bc", "aa", "a"]
    assert t.encode("ax", add_special=False) == [3, 0]


def test_missing_bytes_and_no_unknown_token():
    keys = metadata("llama", ["a", "b"], bos_token_id=0, eos_token_id=1, add_space_prefix=False)
    t = Tokenizer.from_metadata(keys)
    assert t.unk_id == 0
    keys["tokenizer.ggml.unknown_token_id"] = 0xFFFFFFFF
    assert Tokenizer.from_metadata(keys).encode("x", add_special=False) == [0]


def test_bpe_pieces_that_are_no_tokens_become_their_bytes():
    keys = metadata("gpt2", ["a", "b", "c", "bc"], pre="gpt-2", merges=["a b", "b c"], bos_token_id=0, eos_token_id=0)
    t = Tokenizer.from_metadata(keys)
    assert t.encode("abc") == [0, 1, 2]
    assert t.encode("axbc") == [0, 3]


@pytest.mark.parametrize("model", ["none", "no_vocab", "test", "wordlevel"])
def test_other_kinds_are_refused(model):
    with pytest.raises(TokenizerError, match=rf"tokenizer.ggml.model.*'{model}'.*expected one of llama, gpt2"):
        Tokenizer.from_metadata(metadata(model, ["a"]), "file.gguf")


def test_lone_surrogate_is_refused():
    t = Tokenizer.from_metadata(spm())
    with pytest.raises(TokenizerError, match=r"surrogate.*at 1"):
        t.encode("a\ud800")


@pytest.mark.parametrize("name", ["spm-0", "unigram", "wordpiece", "rwkv", "plamo2", "hybriddna"])
def test_time_is_near_linear(name):
    """100,000 characters without a space, over and over the same, or none alike."""
    make, arguments = KINDS[name]
    t = Tokenizer.from_metadata(make(**arguments))
    rng = random.Random(0)
    for text in ("a" * 100_000, " " * 100_000, "".join(rng.choice("abcde你") for _ in range(100_000))):
        t.encode(text)
