"""Masks of GBNF grammars against llama.cpp's own grammar engine, along random walks over real vocabularies."""

import codecs

import numpy as np
import pytest
from conftest import data_files
from grammar_walks import load, random_walk
from llama_cpp_grammar import allowed

from oxjax.constrain import Grammar

# What the files of llama.cpp do not have: ambiguity of every kind, bounds, escapes, empty parts, tokens.
GRAMMARS = [
    'root ::= "a" "b" | "a" "c"',
    'root ::= "a" "b" "x" | "ab" "c" | [ab]+ "d"',
    'root ::= [a-z]+ "z"',
    'root ::= word "z" | "(" root ")"\nword ::= [a-z]+',
    'root ::= item{2,4} ("," item){0,} "."{3}\nitem ::= "x" | "xy"? "y"',
    'root ::= ("a"? "b" | "abab" "c")+ "!"',
    "root ::= . . .",
    r'root ::= "\x41\u00e9\U0001F600\"\\" [^\n\t\]\x00-\x7f-]{1,3} "é" [あ-んア-ン]* # the end',
    'root ::=\n  "a" |\n  ( "b"\n  | "c" root # of two\n  )',
    'root ::= <[262]> "a" | !<[262]> "b" | <[257]>* "c"',
]


def compare(path, grammars: list[str], seeds: range, steps: int) -> None:
    """Every difference is one of five that are wanted.

    llama.cpp takes control tokens for their text and does not check that bytes are UTF-8. It refuses a token that
    begins with NUL; one that ends inside a character of which some completion is excluded by `[^...]`; and one that is
    named by its id, or not excluded by it, but is no whole text.
    """
    tokenizer, compiler = load(path)
    walks, masks = [], []
    for grammar in grammars:
        for seed in seeds:
            tokens, seen = random_walk(compiler.start(Grammar.gbnf(grammar)), tokenizer, seed, steps)
            walks.append((grammar, tokens))
            masks.append(seen)
    for (grammar, tokens), ours, theirs in zip(walks, masks, allowed(path, walks), strict=True):
        texts = [b""]
        for token in tokens:
            texts.append(texts[-1] + tokenizer.token_bytes(token))
        for text, ours_here, theirs_here in zip(texts, ours, theirs, strict=True):
            for token in np.flatnonzero(ours_here & ~theirs_here):
                piece = tokenizer.token_bytes(token)
                inside = ends_inside_character(text + piece)
                is_cut = inside if "[^" in grammar else inside is not False if "<[" in grammar else False
                assert piece.startswith(b"\0") or is_cut, piece
            for token in np.flatnonzero(theirs_here & ~ours_here):
                piece = tokenizer.token_bytes(token)
                assert tokenizer.is_special(token) or ends_inside_character(text + piece) is None, piece


def ends_inside_character(text: bytes) -> bool | None:
    """None where the bytes cannot begin a UTF-8 text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(text)
    except UnicodeDecodeError:
        return None
    return bool(decoder.getstate()[0])


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
    assert [ends_inside_character(text) for text in (b"a", b"\xe3\x81", b"\xf5")] == [False, True, None]
