"""Random texts in the language of a grammar, token by token, and what llama.cpp allows along them."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from oxjax.constrain import Grammar
from oxjax.constrain.matcher import GrammarCompiler, Matcher
from oxjax.tokenizer import Tokenizer
from tests.helpers.llama_cpp_grammar import allowed

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


@cache
def load(path: Path) -> tuple[Tokenizer, GrammarCompiler]:
    """The tokenizer of a file, and a compiler for as many logits as it has tokens."""
    tokenizer = Tokenizer.from_gguf(path)
    return tokenizer, GrammarCompiler(tokenizer, tokenizer.vocab_size)


def allowed_tokens(matcher: Matcher) -> np.ndarray:
    """The mask as bool `[words * 32]`."""
    return np.unpackbits(matcher.mask().view(np.uint8), bitorder="little").astype(bool)


def random_walk(matcher: Matcher, tokenizer: Tokenizer, seed: int, steps: int) -> tuple[list[int], np.ndarray]:
    """Tokens drawn from what is allowed, and the masks `[1 + tokens, vocab]` before and after them.

    Short tokens are drawn more often than their share, so that the walk meets more of the grammar.
    """
    rng = np.random.default_rng(seed)
    is_short = np.array([len(piece) <= 2 for piece in tokenizer.vocab_bytes()])
    is_end = np.zeros(tokenizer.vocab_size, bool)
    is_end[list(tokenizer.eog_ids)] = True
    tokens, masks = [], [allowed_tokens(matcher)[: tokenizer.vocab_size]]
    while len(tokens) < steps and (open_ := masks[-1] & ~is_end).any():
        short = open_ & is_short
        token = int(rng.choice(np.flatnonzero(short if short.any() and rng.random() < 0.7 else open_)))
        matcher.advance(token)
        tokens.append(token)
        masks.append(allowed_tokens(matcher)[: tokenizer.vocab_size])
    return tokens, np.stack(masks)


def compared(
    path: Path, grammars: list[str], seeds: range, steps: int
) -> Iterator[tuple[np.ndarray, np.ndarray, list[bytes]]]:
    """Masks along random walks: ours, llama.cpp's, and the tokens in which they differ though they should not.

    Five differences are wanted. llama.cpp takes control tokens for their text and does not check that bytes are UTF-8.
    It refuses a token that begins with NUL; one that ends inside a character of which some completion is excluded by
    `[^...]`; and one that is named by its id, or not excluded by it, but is no whole text.
    """
    tokenizer, compiler = load(path)
    walks, masks = [], []
    for grammar in grammars:
        for seed in seeds:
            tokens, seen = random_walk(compiler.start(Grammar.gbnf(grammar)), tokenizer, seed, steps)
            walks.append((grammar, tokens))
            masks.append(seen)
    for (grammar, tokens), ours, theirs in zip(walks, masks, allowed(path, walks), strict=True):
        text = b""
        for i, (ours_here, theirs_here) in enumerate(zip(ours, theirs, strict=True)):
            text += tokenizer.token_bytes(tokens[i - 1]) if i else b""
            unwanted = []
            for token in np.flatnonzero(ours_here != theirs_here):
                piece = tokenizer.token_bytes(token)
                inside = ends_inside_character(text + piece)
                if ours_here[token]:
                    is_cut = inside if "[^" in grammar else inside is not False if "<[" in grammar else False
                    is_wanted = piece.startswith(b"\0") or is_cut
                else:
                    is_wanted = tokenizer.is_special(token) or inside is None
                if not is_wanted:
                    unwanted.append(piece)
            yield ours_here, theirs_here, unwanted


def ends_inside_character(text: bytes) -> bool | None:
    """None where the bytes cannot begin a UTF-8 text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(text)
    except UnicodeDecodeError:
        return None
    rest = decoder.getstate()[0]
    return None if b"\xed\xa0" <= rest < b"\xee" else bool(rest)  # the decoder waits for the end of a surrogate
