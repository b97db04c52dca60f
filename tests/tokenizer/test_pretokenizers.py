"""Every pre-tokeniser by name, against llama.cpp on a vocabulary that shows where a text was cut."""

import unicodedata

import pytest
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from oxjax.errors import TokenizerError, UnknownPreTokenizerError
from oxjax.tokenizer import Tokenizer
from oxjax.tokenizer.pretokenizers import PRE_TOKENIZERS, build, expand
from oxjax.tokenizer.unicode import WHITESPACE, category, ranges
from tests.helpers.oracle import LlamaCpp
from tests.helpers.synthetic_vocab import BYTES, metadata, pair_vocabulary, random_texts, write_gguf

# One name for each way of cutting; many names share one.
DISTINCT = list({spec: name for name, spec in PRE_TOKENIZERS.items()}.values())


def words(name: str, text: str) -> list[str]:
    """The words of a text, in plain characters."""
    return [text[a:b] for _, (a, b) in build(PRE_TOKENIZERS[name]).pre_tokenize_str(text)]


def test_known_cuts():
    text = "Hello  world's 12345 fooBAR\n\n  x"
    assert words("gpt-2", text) == ["Hello", " ", " world", "'s", " 12345", " fooBAR", "\n\n ", " x"]
    assert words("llama-bpe", text) == [
        "Hello", " ", " world", "'s", " ", "123", "45", " fooBAR", "\n\n", " ", " x",
    ]  # fmt: skip
    assert words("qwen2", "a 12\r\n b") == ["a", " ", "1", "2", "\r\n", " b"]
    assert words("gpt-4o", "camelCase's") == ["camel", "Case's"]
    assert words("superbpe", "a 1234567") == ["a ", "1", "234", "567"]
    assert words("afmoe", "x 12345") == ["x", " ", "12", "345"]
    assert words("kimi-k2", "汉字abc's") == ["汉字", "abc's"]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_expressions_compile_and_keep_every_character(name):
    for text in random_texts(6, 20):
        assert "".join(words(name, text)) == text


@pytest.mark.parametrize("name", sorted(set(DISTINCT) - {"superbpe"}))
def test_time_is_linear(name):
    """Long runs of one character: anything quadratic would take minutes.

    superbpe's expression, which looks ahead to the end of a number at each digit of it, is quadratic by definition.
    """
    pre = build(PRE_TOKENIZERS[name])
    for text in (" " * 50_000, "1" * 50_000, "a" * 50_000, "é" * 50_000, "\n" * 50_000, "'" * 50_000, "! " * 21_500):
        pre.pre_tokenize_str(text)


def vocabulary(name: str) -> dict:
    if PRE_TOKENIZERS[name].byte_level:
        tokens, merges = pair_vocabulary()
        return metadata("gpt2", tokens, pre=name, merges=merges)
    letters = list(dict.fromkeys("".join(random_texts(5, 60))))
    letters = [c for c in letters if c not in " \n" and not "\ue000" <= c <= "\uf8ff"][:90]
    letters.append("▁")
    pairs = [(a, b) for a in letters for b in letters]
    tokens = list(dict.fromkeys([*letters, *(a + b for a, b in pairs), "\n", "\n\n", "\n\n\n"]))
    model = "whitespace" if name == "whitespace" else "gpt2"
    types = [1] * len(tokens) + [6] * 256
    return metadata(model, tokens + BYTES, types=types, pre=name, merges=[f"{a} {b}" for a, b in pairs])


def agree(name, tmp_path, seed, count):
    keys = vocabulary(name)
    t = Tokenizer.from_metadata(keys, name)
    texts = random_texts(seed, count)
    with LlamaCpp(write_gguf(tmp_path / "vocab.gguf", keys)) as oracle:
        expected = oracle.tokenize_all(texts, False, False)
        found, decoded = oracle.special(), oracle.detokenize_all(expected)
    for text, ids in zip(texts, expected, strict=True):
        assert t.encode(text, add_special=False, parse_special=False) == ids, text
    if name != "whitespace":  # llama.cpp decodes these tokens by the byte alphabet, in which they are not written
        assert [t.decode(ids) for ids in expected] == [d.decode("utf-8", "replace") for d in decoded]
    assert (t.add_bos, t.add_eos, t.add_sep) == (found["add_bos"], found["add_eos"], found["add_sep"])
    assert (-1 if t.bos_id is None else t.bos_id) == found["bos"]


@pytest.mark.parametrize("name", DISTINCT)
def test_agrees_with_llama_cpp(name, tmp_path):
    agree(name, tmp_path, 7, 60)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_agrees_with_llama_cpp_at_length(name, tmp_path):
    agree(name, tmp_path, 8, 1_500)


def test_unknown_name_is_an_error():
    tokens, merges = pair_vocabulary()
    with pytest.raises(UnknownPreTokenizerError, match=r"'my-tokenizer'.*expected one of.*llama-bpe") as caught:
        Tokenizer.from_metadata(metadata("gpt2", tokens, pre="my-tokenizer", merges=merges), "file.gguf")
    assert "file.gguf" in str(caught.value)
    assert isinstance(caught.value, TokenizerError)


def test_categories_agree_with_python_where_both_know_the_character():
    for letter in "LNZMPSC":
        for low, high in ranges(letter):
            assert category(low) == category(high) == letter
            found = {unicodedata.category(chr(codepoint)) for codepoint in range(low, high + 1)}
            assert all(x[0] == letter or x == "Cn" for x in found), hex(low)


def test_white_space_is_the_regex_engines():
    text = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    kept = "".join(piece for piece, _ in Split(Regex(r"\s"), "removed").pre_tokenize_str(text))
    assert {ord(c) for c in set(text) - set(kept)} == WHITESPACE


def test_properties_expand_inside_and_outside_brackets():
    assert ranges("N")[0] == (0x30, 0x39)
    assert expand(r"\p{N}").startswith(r"[\x{30}-\x{39}")
    assert expand(r"[^\s\p{N}]").startswith(r"[^\s\x{30}-\x{39}")
    assert expand(r"\[\p{N}").startswith(r"\[[\x{30}")
