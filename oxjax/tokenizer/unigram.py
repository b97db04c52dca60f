"""Unigram (`t5`): the segmentation whose tokens' log-probabilities add up to most.

Our own, because the library's normaliser works by grapheme where SentencePiece and llama.cpp take the longest
match at each character, and it scores unknown characters and user-defined tokens differently.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from oxjax.errors import TokenizerError
from oxjax.tokenizer.spm import SPACE, splitter
from oxjax.tokenizer.vocab import NORMAL, UNUSED, USER_DEFINED, Vocabulary

_UNKNOWN_PENALTY = 10.0
_CACHE_ENTRIES, _CACHE_CHARACTERS = 1 << 16, 64


class Charsmap:
    """The rewriting rules of a precompiled SentencePiece normaliser.

    They lie in an XOR-compressed double array (Kanda 2018): bits 10-30 of an entry are its base, shifted by 8 if
    bit 9 is set, bits 0-7 the byte that leads to it, and bit 8 says that its base points to a value.
    """

    def __init__(self, blob: bytes, source: str):
        """Read the blob: size of the trie in bytes (little-endian), the trie, NUL-terminated replacements."""
        end = 4 + int.from_bytes(blob[:4], "little")
        units = np.frombuffer(blob[4 : end - end % 4], "<u4").astype(np.int64)
        self._source, self._replacements = source, blob[end:]
        self._base = ((units >> 10) << ((units & 512) >> 6)).tolist()
        self._label, self._units = (units & 0x800000FF).tolist(), units.tolist()
        # No rule then contains a space, and words can be rewritten one by one.
        self.keeps_spaces = not bool(np.any(units & 0x800000FF == ord(" ")))

    def longest(self, data: bytes, start: int) -> tuple[int, bytes] | None:
        """Length and replacement of the longest rule that matches there, or None.

        Raises:
            TokenizerError: the trie points outside itself.
        """
        if not self._units:
            return None
        found = None
        try:
            node = self._base[0]
            for at in range(start, len(data)):
                byte = data[at]
                node ^= byte
                if not byte or self._label[node] != byte:
                    break
                leaf = self._units[node] & 256
                node ^= self._base[node]
                if leaf:
                    found = at + 1 - start, self._units[node] & 0x7FFFFFFF
            return found and (found[0], self._replacements[found[1] : self._replacements.index(b"\0", found[1])])
        except (IndexError, ValueError):
            raise TokenizerError(
                f"{self._source}: tokenizer.ggml.precompiled_charsmap: found a rule that points outside it; expected "
                f"{len(self._units)} entries and {len(self._replacements)} bytes of replacements"
            ) from None


class Normalizer:
    """SentencePiece's normalisation: at every character the longest rule that matches; then spaces."""

    def __init__(self, vocab: Vocabulary):
        self._rules = Charsmap(vocab.charsmap, vocab.source)
        self._prefix, self._merge = vocab.add_space_prefix, vocab.remove_extra_whitespaces
        own = [t.encode() for t, a in zip(vocab.texts, vocab.types, strict=True) if a & USER_DEFINED]
        # llama.cpp copies whatever begins like a user-defined token, even where the token does not follow.
        self._beginnings = {text[:n] for text in own for n in range(1, len(text) + 1)}
        self._known: dict[str, str] = {}

    def __call__(self, text: str) -> str:
        """The text as the model was trained to see it, spaces as U+2581."""
        by_words = self._rules.keeps_spaces and not any(b" " in text for text in self._beginnings)
        text = " ".join(map(self._word, text.split(" "))) if by_words else self._rewrite(text)
        if self._merge:
            return "".join(SPACE + word for word in text.split(" ") if word)
        words = text.lstrip(" ")
        prefix = SPACE if self._prefix and words else ""
        return SPACE * (len(text) - len(words)) + prefix + words.replace(" ", SPACE)

    def _word(self, word: str) -> str:
        out = self._known.get(word)
        if out is None:
            out = self._rewrite(word)
            if len(word) <= _CACHE_CHARACTERS:
                if len(self._known) >= _CACHE_ENTRIES:
                    self._known.clear()
                self._known[word] = out
        return out

    def _rewrite(self, text: str) -> str:
        data, out, at = text.encode(), [], 0
        while at < len(data):
            end = at
            while end < len(data) and data[at : end + 1] in self._beginnings:
                end += 1
            if end == at:
                rule = self._rules.longest(data, at)
                size = _utf8_length(data[at])
                end = at + (rule[0] if rule else max(size, 1))
                out.append(rule[1] if rule else data[at:end] if size else b"\xef\xbf\xbd")
            else:
                out.append(data[at:end])
            at = end
        return b"".join(out).decode("utf-8", "replace")


def _utf8_length(lead: int) -> int:
    """Bytes of the character that a byte begins, 0 for a byte that begins none."""
    return 1 if lead < 0x80 else 0 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4


def _lengths(texts: Iterable[str]) -> dict[str, list[int]]:
    """First character -> lengths of the texts that begin with it."""
    found: dict[str, set[int]] = {}
    for text in texts:
        found.setdefault(text[0], set()).add(len(text))
    return {head: sorted(lengths) for head, lengths in found.items()}


class UnigramEncoder:
    """Text without special tokens -> ids.

    Cut into words where no token can reach across; the best segmentation of a word is remembered.
    """

    def __init__(self, vocab: Vocabulary):
        if vocab.unk_id is None:
            raise TokenizerError(f"{vocab.source}: tokenizer.ggml.unknown_token_id: missing; Unigram needs it")
        self._unk = vocab.unk_id
        self._normalize = Normalizer(vocab)
        self._ids = {text: i for text, i in vocab.ids.items() if vocab.types[i] & (NORMAL | USER_DEFINED | UNUSED)}
        self._scores = [
            0.0 if attr & USER_DEFINED else score
            for attr, score in zip(vocab.attrs, vocab.scores.tolist(), strict=True)
        ]
        normal = vocab.scores[[bool(t & NORMAL) for t in vocab.types]]
        self._unknown_score = float(normal.min(initial=np.inf) - np.float32(_UNKNOWN_PENALTY))
        self._lengths = _lengths(self._ids)
        self._split = splitter(list(self._ids))
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """Ids of a text; unknown characters in a row are one unknown token."""
        out: list[int] = []
        for word in self._split.split(self._normalize(text)):
            ids = self._known.get(word)
            if ids is None:
                ids = self._best(word)
                if len(word) <= _CACHE_CHARACTERS:
                    if len(self._known) >= _CACHE_ENTRIES:
                        self._known.clear()
                    self._known[word] = ids
            out += ids[1:] if out and ids and out[-1] == ids[0] == self._unk else ids
        return out

    def _best(self, word: str) -> list[int]:
        """Viterbi: `best[i]` is the score of the best way to spell the first i characters."""
        n, unk = len(word), self._unk
        best, tokens, starts = [0.0] + [-np.inf] * n, [unk] * (n + 1), [0] * (n + 1)
        for i in range(n):
            here, single = best[i], False
            for length in self._lengths.get(word[i], ()):
                token = self._ids.get(word[i : i + length])
                if token is None or i + length > n:
                    continue
                single |= length == 1
                if here + self._scores[token] > best[i + length]:
                    best[i + length], tokens[i + length], starts[i + length] = here + self._scores[token], token, i
            if not single and here + self._unknown_score > best[i + 1]:
                best[i + 1], tokens[i + 1], starts[i + 1] = here + self._unknown_score, unk, i
        out: list[int] = []
        while n:
            if not (out and out[-1] == tokens[n] == unk):
                out.append(tokens[n])
            n = starts[n]
        return out[::-1]
