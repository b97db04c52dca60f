"""WordPiece (`bert`): normalise, cut into words, and take the longest token that matches, again and again.

The library's WordPiece and BERT normaliser are not llama.cpp's: it keeps only the first code point of a canonical
decomposition (a Hangul syllable becomes its first consonant), and has no limit on the length of a word.
"""

from __future__ import annotations

import unicodedata

from oxjax.errors import TokenizerError
from oxjax.tokenizer.unicode import WHITESPACE, category
from oxjax.tokenizer.vocab import Vocabulary

_CACHE_ENTRIES = 1 << 16
_CHINESE = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


class _Normalizer(dict[int, str]):
    """Normalised form of each code point, computed at first use; `str.translate` then handles a whole text."""

    def __init__(self, lowercase: bool, strip_accents: bool):
        super().__init__()
        self._lowercase, self._strip_accents = lowercase, strip_accents

    def __missing__(self, codepoint: int) -> str:
        self[codepoint] = out = self._normalize(codepoint)
        return out

    def _normalize(self, codepoint: int) -> str:
        if self._strip_accents:
            codepoint = ord(unicodedata.normalize("NFD", chr(codepoint))[0])
        if codepoint in WHITESPACE:
            return " "
        kind = category(codepoint)
        if kind == "C" or codepoint == 0xFFFD or (self._strip_accents and kind == "M"):
            return ""
        character = chr(codepoint).lower()[0] if self._lowercase else chr(codepoint)
        alone = kind == "P" or (codepoint < 0x7F and kind == "S") or any(a <= codepoint <= b for a, b in _CHINESE)
        return f" {character} " if alone else character


class WordPieceEncoder:
    """Text without special tokens -> ids. Token texts mark the beginning of a word with U+2581."""

    def __init__(self, vocab: Vocabulary):
        if vocab.unk_id is None:
            raise TokenizerError(f"{vocab.source}: tokenizer.ggml.unknown_token_id: missing; WordPiece needs it")
        self._ids, self._unk = vocab.ids, vocab.unk_id
        self._longest = max(map(len, vocab.texts))
        self._normalizer = _Normalizer(vocab.lowercase, vocab.strip_accents)
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """Ids of a text."""
        out: list[int] = []
        for word in text.translate(self._normalizer).split(" "):
            if word:
                ids = self._known.get(word)
                if ids is None:
                    if len(self._known) >= _CACHE_ENTRIES:
                        self._known.clear()
                    self._known[word] = ids = self._match("▁" + word)
                out += ids
        return out

    def _match(self, word: str) -> list[int]:
        """Longest token first, from the left; a word with a part that is no token is unknown as a whole."""
        out: list[int] = []
        start = 0
        while start < len(word):
            for end in range(min(len(word), start + self._longest), start, -1):
                token = self._ids.get(word[start:end])
                if token is not None:
                    out.append(token)
                    start = end
                    break
            else:
                return [self._unk]
        return out
