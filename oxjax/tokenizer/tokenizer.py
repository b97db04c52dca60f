"""Tokenizer of a GGUF file, with the rules that all kinds of vocabulary share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from operator import index
from os import PathLike
from pathlib import Path
from typing import SupportsIndex

from oxjax.errors import TokenizerError
from oxjax.tokenizer.bpe import BytePairEncoder, HybridDnaEncoder, WhitespaceEncoder
from oxjax.tokenizer.detokenizer import IncrementalDetokenizer, clean_spaces
from oxjax.tokenizer.pieces import token_bytes
from oxjax.tokenizer.plamo2 import Plamo2Encoder
from oxjax.tokenizer.rwkv import RwkvEncoder
from oxjax.tokenizer.special import SpecialMatcher, SpecialToken
from oxjax.tokenizer.spm import SentencePieceEncoder
from oxjax.tokenizer.unigram import UnigramEncoder
from oxjax.tokenizer.vocab import CONTROL, LSTRIP, RSTRIP, SPECIAL, USER_DEFINED, Vocabulary
from oxjax.tokenizer.wordpiece import WordPieceEncoder

_ENCODERS: Mapping[str, Callable[[Vocabulary], Callable[[str], list[int]]]] = {
    "spm": SentencePieceEncoder,
    "wordpiece": WordPieceEncoder,
    "unigram": UnigramEncoder,
    "rwkv": RwkvEncoder,
    "plamo2": Plamo2Encoder,
    "hybriddna": HybridDnaEncoder,
    "whitespace": WhitespaceEncoder,
    "bpe": BytePairEncoder,
}


class Tokenizer:
    """Text to ids and back, as llama.cpp does it for the same file.

    Attributes:
        model: `tokenizer.ggml.model`.
        pre: `tokenizer.ggml.pre`, or None.
        vocab_size: number of tokens.
        bos_id, eos_id, unk_id, sep_id, pad_id: ids, or None.
        eog_ids: every token that ends a generation.
        add_bos, add_eos, add_sep: encoding adds these tokens, according to the file.
        add_space_prefix: a text gets a space in front that decoding takes away.
    """

    def __init__(self, vocab: Vocabulary):
        self._vocab = vocab
        self._bytes = token_bytes(vocab)
        self._encoder = _ENCODERS[vocab.model if vocab.model in _ENCODERS else vocab.algorithm](vocab)
        self._matcher = SpecialMatcher(
            SpecialToken(i, text, bool(attr & SPECIAL), bool(attr & LSTRIP), bool(attr & RSTRIP))
            for i, (text, attr) in enumerate(zip(vocab.texts, vocab.attrs, strict=True))
            if attr & (SPECIAL | USER_DEFINED)
        )
        self.model, self.pre, self.vocab_size = vocab.model, vocab.pre, len(vocab.texts)
        self.bos_id, self.eos_id, self.unk_id = vocab.bos_id, vocab.eos_id, vocab.unk_id
        self.sep_id, self.pad_id, self.eog_ids = vocab.sep_id, vocab.pad_id, vocab.eog_ids
        self.add_bos, self.add_eos, self.add_sep = vocab.add_bos, vocab.add_eos, vocab.add_sep
        self.add_space_prefix = vocab.add_space_prefix
        self._head, self._tail = self._frame()

    @classmethod
    def from_gguf(cls, path: str | PathLike[str]) -> Tokenizer:
        """Read the tokenizer of a GGUF file.

        Raises:
            GGUFError: the file is not a readable GGUF file.
            TokenizerError: its vocabulary is missing, malformed or of an unsupported kind.
            UnknownPreTokenizerError: its `tokenizer.ggml.pre` is not known.
        """
        # Here and not above: reading files needs more than a tokenizer does.
        from oxjax.gguf import GGUFFile  # noqa: PLC0415

        with GGUFFile.open(Path(path)) as file:
            return cls.from_metadata(file.metadata, source=str(path))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object], source: str = "metadata") -> Tokenizer:
        """Make a tokenizer from the `tokenizer.ggml.*` keys.

        Args:
            metadata: keys and values of a GGUF header; arrays as lists or NumPy arrays.
            source: name for error messages.

        Raises:
            TokenizerError: the vocabulary is missing, malformed or of an unsupported kind.
            UnknownPreTokenizerError: `tokenizer.ggml.pre` is not known.
        """
        return cls(Vocabulary.from_metadata(metadata, source))

    def _frame(self) -> tuple[list[int], list[int]]:
        """Ids that `add_special` puts before and after a text."""
        v = self._vocab
        if v.algorithm in ("rwkv", "plamo2"):
            return [], []
        wordpiece = v.algorithm == "wordpiece"
        head = [("bos_token_id", v.bos_id)] if v.add_bos or wordpiece else []
        tail = [("seperator_token_id", v.sep_id)] if wordpiece else [("eos_token_id", v.eos_id)] * v.add_eos
        for key, token in head + tail:
            if token is None:
                raise TokenizerError(f"{v.source}: tokenizer.ggml.{key}: missing; expected an id, encoding adds it")
        return [i for _, i in head if i is not None], [i for _, i in tail if i is not None]

    @property
    def n_special(self) -> int:
        """Number of tokens that `encode` adds to a text."""
        return len(self._head) + len(self._tail)

    def encode(
        self, text: str, add_special: bool = True, parse_special: bool = True, *, max_length: int | None = None
    ) -> list[int]:
        """Encode a text to token ids.

        Args:
            text: any text that UTF-8 can encode.
            add_special: add BOS, EOS or SEP if the file says so.
            parse_special: read the texts of control tokens as those tokens; False for text that users control.
            max_length: maximum number of ids; the text is truncated at its end, tokens of `add_special` are
                always kept. None keeps all.

        Raises:
            TokenizerError: the text has a lone surrogate, or a character that the vocabulary cannot spell.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"text: found the lone surrogate {text[error.start]!r} at {error.start}; expected what UTF-8 can write"
            ) from None
        out = list(self._head) if add_special else []
        # A text begins with the file's space, and so does what follows a special token (SentencePiece BPE only).
        prefix = " " if self.add_space_prefix and self._vocab.algorithm == "spm" else ""
        after_special = True
        for piece in self._matcher.split(text, parse_special):
            if isinstance(piece, int):
                out.append(piece)
            else:
                out += self._encoder(prefix + piece if after_special else piece)
            after_special = isinstance(piece, int)
        tail = self._tail if add_special else []
        return (out if max_length is None else out[: max_length - len(tail)]) + tail

    @property
    def head_ids(self) -> list[int]:
        """Ids that `add_special` puts before a text."""
        return list(self._head)

    def encode_batch(
        self, texts: Iterable[str], add_special: bool = True, parse_special: bool = True
    ) -> list[list[int]]:
        """Ids of several texts; see `encode`."""
        return [self.encode(text, add_special, parse_special) for text in texts]

    def decode(self, ids: Iterable[SupportsIndex], skip_special: bool = False, continues: bool = False) -> str:
        """Decode token ids to text; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids.
            skip_special: drop control and unknown tokens.
            continues: the ids follow others, so a leading space is the text's own and stays.

        Raises:
            TokenizerError: an id is not in the vocabulary.
        """
        pieces = [piece for i in ids if (piece := self._piece(i, skip_special)) is not None]
        if pieces and self.add_space_prefix and not continues:
            pieces[0] = pieces[0].removeprefix(b" ")
        text = b"".join(pieces).decode("utf-8", "replace")
        return clean_spaces(text) if self._vocab.clean_spaces else text

    def detokenizer(self, skip_special: bool = False, continues: bool = False) -> IncrementalDetokenizer:
        """Incremental detokenizer: its texts together are `decode` of all ids."""
        return IncrementalDetokenizer(
            lambda i: self._piece(i, skip_special),
            clean=self._vocab.clean_spaces,
            strip_first_space=self.add_space_prefix and not continues,
        )

    def _check(self, token: SupportsIndex) -> int:
        found = index(token)
        if not 0 <= found < self.vocab_size:
            raise TokenizerError(f"token id: found {found}; expected 0 to {self.vocab_size - 1}")
        return found

    def _piece(self, token: SupportsIndex, skip_special: bool) -> bytes | None:
        piece = self._bytes[self._check(token)]
        return None if skip_special and self.is_special(token) else piece

    def token_bytes(self, token: SupportsIndex) -> bytes:
        """Bytes of a token: control tokens have their own text, unused ones none.

        Raises:
            TokenizerError: the id is not in the vocabulary.
        """
        return self._bytes[self._check(token)]

    def vocab_bytes(self) -> Sequence[bytes]:
        """Bytes of every token, by id; one list, not to be changed."""
        return self._bytes

    def token_text(self, token: SupportsIndex) -> str:
        """Text of a token as the file writes it.

        Raises:
            TokenizerError: the id is not in the vocabulary.
        """
        return self._vocab.texts[self._check(token)]

    def id_of(self, text: str) -> int | None:
        """Id of the token with this text in the file, or None."""
        return self._vocab.ids.get(text)

    def is_special(self, token: SupportsIndex) -> bool:
        """True for control and unknown tokens, which ordinary text cannot contain.

        Raises:
            TokenizerError: the id is not in the vocabulary.
        """
        return bool(self._vocab.attrs[self._check(token)] & SPECIAL)

    @cached_property
    def control_texts(self) -> tuple[str, ...]:
        """Texts of the control tokens."""
        return tuple(t for t, attr in zip(self._vocab.texts, self._vocab.attrs, strict=True) if attr & CONTROL)
