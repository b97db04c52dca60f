"""RWKV's world tokeniser (`rwkv`): always the longest token that matches, byte by byte."""

from __future__ import annotations

import re

from oxjax.errors import TokenizerError
from oxjax.tokenizer.vocab import Vocabulary

_ESCAPE = re.compile(rb"\\(?:x([0-9a-f]{2})|(.))", re.DOTALL)
_CONTROLS = {b"t": b"\t", b"n": b"\n", b"r": b"\r"}


def unescape(text: bytes) -> bytes:
    r"""Token texts are written with `\t`, `\n`, `\r`, `\xNN` and a backslash before quotes and itself."""
    return _ESCAPE.sub(lambda m: bytes([int(m[1], 16)]) if m[1] is not None else _CONTROLS.get(m[2], m[2]), text)


class RwkvEncoder:
    """Text without special tokens -> ids."""

    def __init__(self, vocab: Vocabulary):
        self._source, self._unk = vocab.source, vocab.unk_id
        self._ids = {unescape(t.encode("utf-8", "surrogateescape")): i for i, t in enumerate(vocab.texts)}
        lengths: dict[bytes, set[int]] = {}
        for token in self._ids:
            lengths.setdefault(token[:2], set()).add(len(token))
        self._lengths = {head: sorted(found, reverse=True) for head, found in lengths.items()}

    def __call__(self, text: str) -> list[int]:
        """Ids of a text.

        Raises:
            TokenizerError: a byte begins no token and there is no unknown token.
        """
        data, out, at = text.encode(), [], 0
        while at < len(data):
            token, size = self._longest(data, at)
            if token is None:
                raise TokenizerError(
                    f"{self._source}: byte 0x{data[at]:02X} begins no token; expected a vocabulary with every byte "
                    "or tokenizer.ggml.unknown_token_id"
                )
            out.append(token)
            at += size
        return out

    def _longest(self, data: bytes, at: int) -> tuple[int | None, int]:
        for head in (data[at : at + 2], data[at : at + 1]):
            for length in self._lengths.get(head, ()):
                token = self._ids.get(data[at : at + length])
                if token is not None:
                    return token, length
        return self._unk, 1
