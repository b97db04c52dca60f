"""Random texts in the language of a grammar, token by token."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from oxjax.constrain.matcher import GrammarCompiler, Matcher
from oxjax.tokenizer import Tokenizer


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
