"""Masks of GBNF grammars against llama.cpp's own grammar engine, along random walks over real vocabularies."""

import pytest

from tests.helpers.data import data_files
from tests.helpers.grammar_walks import GRAMMARS, compared, ends_inside_character


def compare(path, grammars: list[str], seeds: range, steps: int) -> None:
    for _, _, unwanted in compared(path, grammars, seeds, steps):
        assert not unwanted


def test_grammars_of_llama_cpp(data):
    grammars = [p.read_text() for p in sorted((data / "gbnf").glob("*.gbnf"))]
    compare(data / "vocab" / "ggml-vocab-llama-spm.gguf", grammars, range(1), 20)


def test_ambiguity_escapes_and_tokens(data):
    compare(data / "vocab" / "ggml-vocab-gpt-2.gguf", GRAMMARS, range(3), 8)


@pytest.mark.slow
@pytest.mark.parametrize("path", data_files("vocab/ggml-vocab-*.gguf"))
def test_sweep(path, data):
    if "bert" in path.stem:
        pytest.skip("WordPiece vocabularies do not generate")
    grammars = [p.read_text() for p in sorted((data / "gbnf").glob("*.gbnf"))]
    compare(path, grammars + GRAMMARS, range(2, 4), 25)


def test_ends_inside_character():
    assert [ends_inside_character(text) for text in (b"a", b"\xe3\x81", b"\xed", b"\xf5", b"\xed\xa1")] == [
        False,
        True,
        True,
        None,
        None,
    ]
