"""SentencePiece BPE (`llama`): merge the pair whose token scores highest, then the leftmost.

Not the `tokenizers` library, because its merges have one rank each, while here all ways to make one token and all
tokens of one score tie and the leftmost goes first; and a pair may start from a character that is no token. The library
would also need a merges list of every split of every token at load (2 million for 262,144 tokens).
"""

from __future__ import annotations

import heapq
import re

from oxjax.errors import TokenizerError
from oxjax.tokenizer.vocab import Vocabulary

SPACE = "▁"
_CACHE_ENTRIES, _CACHE_CHARACTERS = 1 << 16, 64


def splitter(texts: list[str]) -> re.Pattern[str]:
    """Expression for the places where no token can reach across: before a space after certain characters.

    Args:
        texts: the tokens, spaces as U+2581.
    """
    before = {SPACE} | {text[i - 1] for text in texts if SPACE in text[1:] for i in _inner_spaces(text)}
    return re.compile(f"(?<=[^{''.join(map(re.escape, sorted(before)))}])(?={SPACE})")


def _inner_spaces(text: str) -> list[int]:
    return [i for i in range(1, len(text)) if text[i] == SPACE]


class SentencePieceEncoder:
    """Text without special tokens, spaces as U+2581 -> ids.

    The text is cut into words where no token can reach across, so what a word becomes does not depend on its
    neighbours and is remembered.
    """

    def __init__(self, vocab: Vocabulary):
        self._source, self._ids, self._unk = vocab.source, vocab.ids, vocab.unk_id
        self._scores = (-vocab.scores.astype(float)).tolist()
        self._split = splitter(list(vocab.texts))
        self._bytes = [vocab.ids.get(f"<0x{b:02X}>", vocab.ids.get(chr(b)) if b < 0x80 else None) for b in range(256)]
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """Ids of a text.

        Raises:
            TokenizerError: a character is no token, nor are its bytes, and there is no unknown token.
        """
        out: list[int] = []
        known = self._known
        for word in self._split.split(text.replace(" ", SPACE)):
            ids = known.get(word)
            if ids is None:
                ids = self._merge(word)
                if len(word) <= _CACHE_CHARACTERS:
                    if len(known) >= _CACHE_ENTRIES:
                        known.clear()
                    known[word] = ids
            out += ids
        return out

    def _merge(self, word: str) -> list[int]:
        """Merge by score. `length[i]` is that of the symbol that starts at character i, 0 once swallowed."""
        n, vocabulary, scores = len(word), self._ids, self._scores
        length, before = [1] * n, list(range(-1, n - 1))
        queue: list[tuple[float, int, int, int]] = []

        def offer(left: int, right: int) -> None:
            size = length[left] + length[right]
            token = vocabulary.get(word[left : left + size])
            if token is not None:
                heapq.heappush(queue, (scores[token], left, right, size))

        for i in range(1, n):
            offer(i - 1, i)
        while queue:
            _, left, right, size = heapq.heappop(queue)
            if not length[left] or not length[right] or length[left] + length[right] != size:
                continue
            length[left], length[right] = size, 0
            after = left + size
            if after < n:
                before[after] = left
                offer(left, after)
            if before[left] >= 0:
                offer(before[left], left)
        return self._tokens(word, length)

    def _tokens(self, word: str, length: list[int]) -> list[int]:
        out: list[int] = []
        i = 0
        while i < len(word):
            piece = word[i : i + length[i]]
            token = self._ids.get(piece)
            out += self._fallback(piece) if token is None else [token]
            i += length[i]
        return out

    def _fallback(self, character: str) -> list[int]:
        found = [self._bytes[b] if self._bytes[b] is not None else self._unk for b in character.encode()]
        if None in found:
            raise TokenizerError(
                f"{self._source}: character {character!r} is no token and neither are its bytes; expected byte "
                "tokens <0x00>..<0xFF> or tokenizer.ggml.unknown_token_id"
            )
        return [token for token in found if token is not None]
