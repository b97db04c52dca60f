"""Encoding of texts to score: pairs of context and continuation, and windows over long texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from oxjax.errors import InvalidRequestError
from oxjax.tokenizer import Tokenizer


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Encode a context and its continuation.

    Both are encoded together and split after the tokens of the context alone, as in lm-evaluation-harness; spaces at
    the end of the context belong to the continuation. Special tokens that the file puts before a text are added once,
    also if the text begins with them; those that it puts after a text are not added. An empty context is BOS, or EOS if
    there is no BOS.

    Args:
        tokenizer: of the model.
        context: any text; the texts of control tokens are those tokens.
        continuation: likewise.

    Raises:
        TokenizerError: see `Tokenizer.encode`.
        InvalidRequestError: the continuation has no tokens of its own, or there is no token for an empty context.
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
    """Encode the beginning of a text: with the special tokens before it, once, and without those after it."""
    ids, head = tokenizer.encode(text, add_special=False), tokenizer.head_ids
    return ids if ids[: len(head)] == head else head + ids


def empty_context(tokenizer: Tokenizer) -> list[int]:
    """Tokens of the empty context.

    Raises:
        InvalidRequestError: the vocabulary has no such token.
    """
    ends = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    found = tokenizer.head_ids or ends[:1]
    if not found:
        raise InvalidRequestError("the context is empty, and the vocabulary has no token that begins or ends texts")
    return found


class Window(NamedTuple):
    """Window of a text: tokens `first` to `end` are scored after tokens `start` to `first`."""

    start: int
    first: int
    end: int


def windows(n_tokens: int, length: int, stride: int) -> Iterator[Window]:
    """Windows that together score every token of a text once, except the first token.

    Args:
        n_tokens: number of tokens of the text.
        length: number of tokens that the model reads in a window; the last scored token need not be read.
        stride: number of tokens that each window after the first scores, after at least `length - stride` others; at
            most `length`.
    """
    first, end = 1, min(n_tokens, length + 1)
    while first < end:
        yield Window(max(0, end - 1 - length), first, end)
        first, end = end, min(n_tokens, end + stride)
