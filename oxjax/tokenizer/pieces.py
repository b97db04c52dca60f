"""Exact bytes of each token."""

from __future__ import annotations

import re

from oxjax.tokenizer.bpe import byte_alphabet
from oxjax.tokenizer.rwkv import unescape
from oxjax.tokenizer.spm import SPACE
from oxjax.tokenizer.vocab import BYTE, NORMAL, SPECIAL, USER_DEFINED, Vocabulary

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class _Codes(dict[str, bytes]):
    def __missing__(self, character: str) -> bytes:
        return _utf8(character)


def token_bytes(vocab: Vocabulary) -> list[bytes]:
    """Bytes of every token, by id.

    Special and user-defined tokens are their own text; unused and untyped ones stand for nothing (llama.cpp,
    `token_to_piece`).
    """
    names = vocab.texts
    if vocab.model == "hybriddna":
        # The mark keeps six letters of DNA apart from an ordinary token; it is no part of the text.
        names = [text.removesuffix("\ue000") for text in names]
    texts = [_utf8(text) for text in names]
    if vocab.algorithm == "rwkv":
        return [unescape(text) for text in texts]
    if vocab.algorithm == "plamo2":
        return [_byte(t) if a & BYTE else raw for t, a, raw in zip(names, vocab.attrs, texts, strict=True)]
    # A character outside the byte alphabet was never made by merging bytes: it stands for itself.
    codes = _Codes({c: bytes([b]) for b, c in enumerate(byte_alphabet())})
    space = _utf8(SPACE)
    out = []
    for text, attr, raw in zip(names, vocab.attrs, texts, strict=True):
        if attr & (SPECIAL | USER_DEFINED):
            out.append(raw)
        elif attr & NORMAL:
            out.append(b"".join([codes[c] for c in text]) if vocab.byte_level else raw.replace(space, b" "))
        else:
            out.append(_byte(text) if attr & BYTE else b"")
    return out


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _byte(text: str) -> bytes:
    found = _BYTE_TOKEN.fullmatch(text)
    return bytes([int(found[1], 16)]) if found else _utf8(text)
