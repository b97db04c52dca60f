"""Byte-pair encoding (`gpt2`, `gemma4`, `hybriddna`, `whitespace`), by the `tokenizers` library."""

from __future__ import annotations

import re

from tokenizers import Tokenizer as Library
from tokenizers.models import BPE

from oxjax.tokenizer.pretokenizers import build, pre_tokenizer
from oxjax.tokenizer.unicode import WHITESPACE
from oxjax.tokenizer.vocab import Vocabulary, pre_name

_BYTE_TOKEN = "<0x{:02X}>"
# A token that is not UTF-8; no text contains it, and the library takes none.
_SURROGATE = re.compile("[\ud800-\udfff]")


def byte_alphabet() -> list[str]:
    """The character that byte-level vocabularies write for each byte (GPT-2, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(shifted)) for b in range(256)]


class BytePairEncoder:
    """Text without special tokens -> ids.

    What a vocabulary may lack gets an id past its end, so that the library does not drop it and join its
    neighbours: single bytes, and pieces that a merge names without there being such a token. `_stand_ins` says
    what those become in the output.
    """

    def __init__(self, vocab: Vocabulary):
        spec = pre_tokenizer(pre_name(vocab.model, vocab.pre), vocab.source)
        self._escape = vocab.escape_whitespaces
        self._newline_words = vocab.ids if spec.newline_words else None
        self._size = len(vocab.texts)
        ids = {text: i for text, i in vocab.ids.items() if not _SURROGATE.search(text)}
        ranks = {}
        for pair in vocab.merges:
            # A pair named twice keeps its first rank, which the library would overwrite.
            if not _SURROGATE.search("".join(pair)):
                ranks.setdefault(pair)
        missing = "".join(byte_alphabet()) if spec.byte_level else ""
        wanted = {*missing, *(piece for a, b in ranks for piece in (a, b, a + b))} - ids.keys()
        self._stand_ins = {self._size: []}
        unknown = "\0unknown"
        while unknown in ids:
            unknown += "\0"
        ids[unknown] = self._size
        for piece in sorted(wanted):
            ids[piece] = len(ids)
            self._stand_ins[ids[piece]] = _as_bytes(piece, vocab, spec.byte_level)
        self._library = Library(
            BPE(
                vocab=ids,
                merges=list(ranks),
                unk_token=unknown,
                fuse_unk=False,
                byte_fallback=not spec.byte_level,
                ignore_merges=vocab.ignore_merges,
            )
        )
        self._library.pre_tokenizer = build(spec)

    def __call__(self, text: str) -> list[int]:
        """Ids of a text."""
        if self._escape:
            text = text.replace(" ", "▁")
        if self._newline_words is None:
            return self._merge(text)
        out, start = [], 0
        for run in re.finditer(r"\n+", text):
            token = self._newline_words.get(run[0])
            if token is not None:
                out += [*self._merge(text[start : run.start()]), token]
                start = run.end()
        return out + self._merge(text[start:])

    def _merge(self, text: str) -> list[int]:
        if not text:
            return []
        found = self._library.encode(text, add_special_tokens=False).ids
        if max(found, default=0) < self._size:
            return found
        return [i for token in found for i in self._stand_ins.get(token, (token,))]


def _as_bytes(piece: str, vocab: Vocabulary, byte_level: bool) -> list[int]:
    """Tokens for a merged piece that is no token, as in llama.cpp: its bytes, if those are tokens."""
    names = [chr(b) for b in piece.encode() if b < 0x80] if byte_level else map(_BYTE_TOKEN.format, piece.encode())
    return [vocab.ids[name] for name in names if name in vocab.ids]


class WhitespaceEncoder:
    """BPE over words cut at white space, which is dropped (`whitespace`, Jina's Chinese embeddings)."""

    def __init__(self, vocab: Vocabulary):
        self._words = BytePairEncoder(vocab)
        self._lowercase = vocab.lowercase
        self._split = re.compile("[" + "".join(map(re.escape, map(chr, sorted(WHITESPACE)))) + "]+")

    def __call__(self, text: str) -> list[int]:
        """Ids of a text."""
        if self._lowercase:
            text = "".join(c.lower()[0] for c in text)
        return [i for word in self._split.split(text) if word for i in self._words(word)]


class HybridDnaEncoder:
    """BPE with stretches of DNA between `<dna>` and `</dna>` cut into six letters a token (`hybriddna`).

    The tokens of six letters carry a private-use mark (U+E000) that keeps them apart from ordinary tokens.
    """

    def __init__(self, vocab: Vocabulary):
        self._words = BytePairEncoder(vocab)
        self._ids = vocab.ids
        self._tags = tuple(vocab.ids.get(name) for name in ("<dna>", "</dna>", "<oov>"))

    def __call__(self, text: str) -> list[int]:
        """Ids of a text."""
        opening, closing, other = self._tags
        if opening is None or closing is None or other is None:
            return self._words(text)
        out = []
        while text:
            before, found, text = text.partition("<dna>")
            out += self._words(before)
            if found:
                strand, closed, text = text.partition("</dna>")
                out += [opening, *self._strand(strand, other), *([closing] if closed else [])]
        return out

    def _strand(self, strand: str, other: int) -> list[int]:
        # Six bytes each, not six characters; what is no base has no token, so how it decodes does not matter.
        data = strand.encode().upper()
        groups = (data[i : i + 6].ljust(6, b"A").decode("utf-8", "replace") for i in range(0, len(data), 6))
        return [self._ids.get(group + "\ue000", other) for group in groups]
