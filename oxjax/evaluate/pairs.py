"""Texts to score as tokens: pairs of context and continuation, and windows over long texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from oxjax.errors import InvalidRequestError
from oxjax.tokenizer import Tokenizer


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context, and of its continuation as it is written after it.

    Both are encoded together and cut where the context alone would end, spaces at the end of the context being part of
    what follows: as lm-evaluation-harness does it. Special tokens that the file puts before a text are there once, also
    if the text spells them, those that it puts behind a text are not. An empty context is the token that texts begin
    with, or else the one that ends them.

    Args:
        tokenizer: of the model.
        context: any text; the texts of control tokens are those tokens.
        continuation: likewise.

    Raises:
        TokenizerError: see `Tokenizer.encode`.
        InvalidRequestError: nothing of the continuation is left, or there is no token for an empty context.
    """
    end = len(context.rstrip())
    context, continuation = context[:end], context[end:] + continuation
    if context:
        before, whole = begin(tokenizer, context), begin(tokenizer, context + continuation)
        after = whole[len(before) :]
    else:
        before, after = empty_context(tokenizer), tokenizer.encode(continuation, add_special=False)
        if after[: len(before)] == before:
            after = after[len(before) :]
    if not after:
        raise InvalidRequestError(f"continuation {continuation!r}: it has no tokens of its own after the context")
    return before, after


def begin(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text that may go on: with the special tokens before it, once, and without those behind it."""
    ids, head = tokenizer.encode(text, add_special=False), tokenizer.head_ids
    return ids if ids[: len(head)] == head else head + ids


def empty_context(tokenizer: Tokenizer) -> list[int]:
    """Tokens that stand for the empty context.

    Raises:
        InvalidRequestError: the vocabulary has no such token.
    """
    ends = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    found = tokenizer.head_ids or ends[:1]
    if not found:
        raise InvalidRequestError("the context is empty, and the vocabulary has no token that begins or ends texts")
    return found


class Window(NamedTuple):
    """Tokens to score: those from `first` to `end` after those from `start` to `first`."""

    start: int
    first: int
    end: int


def windows(n_tokens: int, length: int, stride: int) -> Iterator[Window]:
    """Windows that score every token of a text but the first once.

    Args:
        n_tokens: of the text.
        length: tokens that the model reads in a window; the last one that it scores need not be read.
        stride: tokens that each window but the first scores, with `length - stride` before them or more; at most
            `length`.
    """
    first, end = 1, min(n_tokens, length + 1)
    while first < end:
        yield Window(max(0, end - 1 - length), first, end)
        first, end = end, min(n_tokens, end + stride)
