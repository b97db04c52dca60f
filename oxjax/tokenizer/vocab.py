"""The vocabulary of a GGUF file: typed, checked, with the facts that no metadata key carries worked out.

Sources: the GGUF specification (`tokenizer.ggml.*`) for the keys; llama.cpp's `llama-vocab.cpp` for the
defaults of each kind of vocabulary and for the tokens that it recognises by name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from oxjax.errors import TokenizerError
from oxjax.tokenizer.pretokenizers import pre_tokenizer
from oxjax.tokenizer.special import EOT_NAMES, NAMED_SPECIALS, OWN_SPACE_NAMES, end_of_generation

log = logging.getLogger("oxjax")

# What a token is, as bits; a token found by name can be two things.
UNKNOWN, UNUSED, NORMAL, CONTROL, USER_DEFINED, BYTE, LSTRIP, RSTRIP = (1 << i for i in range(8))
SPECIAL = UNKNOWN | CONTROL

# `tokenizer.ggml.token_type` -> bits; a token of any other type has none.
_TYPES = {1: NORMAL, 2: UNKNOWN, 3: CONTROL, 4: USER_DEFINED, 5: UNUSED, 6: BYTE}
_ABSENT = 0xFFFFFFFF


@dataclass(frozen=True)
class Kind:
    """Defaults of a kind of vocabulary (`tokenizer.ggml.model`), for keys that the file lacks."""

    algorithm: str
    bos: int | None = None
    eos: int | None = None
    unk: int | None = None
    sep: int | None = None
    pad: int | None = None
    add_bos: bool = False
    add_eos: bool = False
    add_sep: bool = False
    add_space_prefix: bool = False
    clean_spaces: bool = False
    escape_whitespaces: bool = True
    byte_level: bool = False
    ignore_merges: bool = False
    lowercase: bool = True


_BPE = Kind("bpe", bos=11, eos=11, clean_spaces=True, escape_whitespaces=False)
KINDS = {
    "llama": Kind("spm", bos=1, eos=2, unk=0, add_bos=True, add_space_prefix=True),
    "gpt2": _BPE,
    "hybriddna": _BPE,
    "whitespace": _BPE,
    "gemma4": Kind("bpe", clean_spaces=True, escape_whitespaces=True),
    "bert": Kind("wordpiece", bos=101, unk=100, sep=102, pad=0, add_bos=True, add_sep=True, clean_spaces=True),
    "t5": Kind("unigram", eos=1, unk=2, pad=0, add_eos=True),
    "rwkv": Kind("rwkv"),
    "plamo2": Kind("plamo2", bos=1, eos=2, unk=0, pad=3),
}


@dataclass(frozen=True)
class Vocabulary:
    """Everything that the algorithms need to know about one vocabulary.

    Attributes:
        source: where it came from, for messages.
        model: `tokenizer.ggml.model`.
        algorithm: `spm`, `bpe`, `wordpiece`, `unigram`, `rwkv` or `plamo2`.
        pre: `tokenizer.ggml.pre`, or None.
        texts: the text of each token; never empty, all different.
        ids: text -> id.
        scores: float32 [vocab], zero where the file has none.
        types: bits of each token as the file says; what matching goes by.
        attrs: bits of each token after the corrections by name; what special tokens go by.
        bos_id, eos_id, unk_id, sep_id, pad_id: ids, or None.
        eog_ids: every token that ends a generation.
        add_bos, add_eos, add_sep: what encoding adds.
        add_space_prefix: a text starts with a space that its reader did not write.
        clean_spaces: decoding drops the space before punctuation and English contractions.
        escape_whitespaces: a space is written U+2581 in token texts.
        byte_level: token texts are in GPT-2's byte alphabet.
        remove_extra_whitespaces: runs of spaces are one space (Unigram).
        lowercase, strip_accents: normalisation (WordPiece).
        ignore_merges: a whole word that is a token stays one, whatever the merges say (BPE).
        merges: ordered pairs (BPE).
        charsmap: the precompiled normaliser (Unigram), empty if none.
    """

    source: str
    model: str
    algorithm: str
    pre: str | None
    texts: Sequence[str]
    ids: Mapping[str, int]
    scores: np.ndarray
    types: Sequence[int]
    attrs: Sequence[int]
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    sep_id: int | None
    pad_id: int | None
    eog_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    add_sep: bool
    add_space_prefix: bool
    clean_spaces: bool
    escape_whitespaces: bool
    byte_level: bool
    remove_extra_whitespaces: bool
    lowercase: bool
    strip_accents: bool
    ignore_merges: bool
    merges: Sequence[tuple[str, str]]
    charsmap: bytes

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object], source: str) -> Vocabulary:
        """Read and check the `tokenizer.ggml.*` keys.

        Raises:
            TokenizerError: a key is missing, of the wrong type or length, or names a token out of range.
            UnknownPreTokenizerError: `tokenizer.ggml.pre` of a BPE vocabulary is not known.
        """
        read = _Reader(metadata, source)
        model = read.text("model")
        if model not in KINDS:
            known = ", ".join(KINDS)
            what = "has no vocabulary" if model in ("none", "no_vocab") else "is not a kind of vocabulary"
            raise read.error("model", f"{model!r} {what} that can be tokenised with", f"one of {known}")
        pre = read.text("pre", None)
        kind = _kind_with_pre(model, pre, source)
        texts, ids = read.tokens()
        types = read.types(len(texts))
        special = {
            name: read.token_id(key, getattr(kind, name), len(texts))
            for name, key in [
                ("bos", "bos_token_id"), ("eos", "eos_token_id"), ("unk", "unknown_token_id"),
                ("sep", "seperator_token_id"), ("pad", "padding_token_id"),
            ]
        }  # fmt: skip
        named = {key: read.token_id(f"{key}_token_id", None, len(texts)) for key in ("eot", "eom", *NAMED_SPECIALS)}
        for key, old in (("fim_pre", "prefix"), ("fim_suf", "suffix"), ("fim_mid", "middle")):
            named[key] = read.token_id(f"{old}_token_id", named[key], len(texts))
        attrs, eog_ids = _special_tokens(texts, ids, types, special["eos"], named)
        _strip_attributes(metadata, pre, ids, attrs)
        lowercase = read.flag("normalizer.lowercase", kind.lowercase)
        vocabulary = cls(
            source=source, model=model, algorithm=kind.algorithm, pre=pre, texts=texts, ids=ids,
            scores=read.scores(len(texts)), types=types, attrs=attrs, eog_ids=eog_ids,
            bos_id=special["bos"], eos_id=special["eos"], unk_id=special["unk"],
            sep_id=special["sep"], pad_id=special["pad"],
            add_bos=read.flag("add_bos_token", kind.add_bos), add_eos=read.flag("add_eos_token", kind.add_eos),
            add_sep=read.flag("add_sep_token", kind.add_sep),
            add_space_prefix=read.flag("add_space_prefix", kind.add_space_prefix),
            clean_spaces=kind.clean_spaces, escape_whitespaces=kind.escape_whitespaces,
            byte_level=kind.byte_level, ignore_merges=kind.ignore_merges,
            remove_extra_whitespaces=read.flag("remove_extra_whitespaces", False),
            lowercase=lowercase, strip_accents=read.flag("normalizer.strip_accents", lowercase),
            merges=read.merges(required=pre != "kimi-k2") if kind.algorithm == "bpe" else (),
            charsmap=read.charsmap() if kind.algorithm == "unigram" else b"",
        )  # fmt: skip
        if pre_name(model, pre) in ("gemma4", "granite-embed-multi-311m") and not vocabulary.add_bos:
            # Files of this family say false and their models need it; llama.cpp overrides it too.
            vocabulary = replace(vocabulary, add_bos=True)
        return vocabulary


def pre_name(model: str, pre: str | None) -> str:
    """The name that the table of pre-tokenisers goes by; a file without one gets llama.cpp's default."""
    return "gemma4" if model == "gemma4" else pre or "default"


def _kind_with_pre(model: str, pre: str | None, source: str) -> Kind:
    """The defaults of the kind, after its pre-tokeniser has set its own."""
    kind = KINDS[model]
    if kind.algorithm != "bpe":
        return kind
    spec = pre_tokenizer(pre_name(model, pre), source)
    return replace(
        kind,
        bos=None if spec.no_bos else kind.bos,
        add_bos=spec.add_bos,
        add_sep=spec.add_sep,
        clean_spaces=spec.clean_spaces,
        escape_whitespaces=spec.escape_whitespaces,
        byte_level=spec.byte_level,
        ignore_merges=spec.ignore_merges,
        lowercase=spec.lowercase,
    )


class _Reader:
    """Typed access to `tokenizer.ggml.*`; every failure names the key, what was found and what was expected."""

    def __init__(self, metadata: Mapping[str, object], source: str):
        self.metadata, self.source = metadata, source

    def error(self, key: str, found: str, expected: str) -> TokenizerError:
        return TokenizerError(f"{self.source}: tokenizer.ggml.{key}: {found}; expected {expected}")

    def get(self, key: str) -> object:
        return self.metadata.get(f"tokenizer.ggml.{key}")

    def text(self, key: str, default: str | None = "") -> str | None:
        value = self.get(key)
        if value is None and default != "":
            return default
        if not isinstance(value, str):
            raise self.error(key, "missing" if value is None else f"found {type(value).__name__}", "a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool | np.bool_):
            raise self.error(key, f"found {value!r}", "a boolean")
        return bool(value)

    def token_id(self, key: str, default: int | None, n_vocab: int) -> int | None:
        value = self.get(key)
        default = default if default is not None and default < n_vocab else None
        if value is None or (isinstance(value, int) and value in (_ABSENT, -1)):
            return default
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise self.error(key, f"found {value!r}", "a token id")
        if not 0 <= value < n_vocab:
            # Published files do this (a padding token one past the end); llama.cpp goes on with its default too.
            log.warning("%s: tokenizer.ggml.%s is %d of %d tokens: using %s", self.source, key, value, n_vocab, default)
            return default
        return int(value)

    def strings(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list | tuple) or not all(isinstance(x, str) for x in value):
            raise self.error(key, "missing" if value is None else "not strings", "an array of strings")
        return list(value)

    def numbers(self, key: str, n_vocab: int) -> np.ndarray | None:
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
            raise self.error(key, f"found {type(value).__name__}", "an array of numbers")
        array = np.asarray(value)
        if array.ndim != 1 or array.dtype.kind not in "iuf":
            raise self.error(key, f"found {array.dtype} {array.shape}", "an array of numbers")
        if len(array) != n_vocab:
            raise self.error(key, f"found {len(array)} entries", f"{n_vocab}, one for each token")
        return array

    def tokens(self) -> tuple[list[str], dict[str, int]]:
        found = self.strings("tokens")
        if not found:
            raise self.error("tokens", "found no tokens", "at least one")
        texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(found)]
        ids = {text: i for i, text in enumerate(texts)}
        if len(ids) < len(texts):
            i = next(i for i, text in enumerate(texts) if ids[text] != i)
            raise self.error("tokens", f"found {texts[i]!r} as {i} and as {ids[texts[i]]}", "different tokens")
        return texts, ids

    def types(self, n_vocab: int) -> list[int]:
        array = self.numbers("token_type", n_vocab)
        if array is None:
            return [NORMAL] * n_vocab
        if array.dtype.kind == "f":
            raise self.error("token_type", f"found {array.dtype}", "integers")
        return [_TYPES.get(t, 0) for t in array.tolist()]

    def scores(self, n_vocab: int) -> np.ndarray:
        array = self.numbers("scores", n_vocab)
        return np.zeros(n_vocab, np.float32) if array is None else array.astype(np.float32)

    def merges(self, *, required: bool) -> list[tuple[str, str]]:
        if self.get("merges") is None and not required:
            return []
        pairs = []
        for i, line in enumerate(self.strings("merges")):
            # A piece may itself begin with a space, so the separator is looked for from the second character.
            cut = line.find(" ", 1)
            if cut < 0 or cut + 1 == len(line):
                raise self.error("merges", f"entry {i} is {line!r}", "two pieces separated by a space")
            pairs.append((line[:cut], line[cut + 1 :]))
        return pairs

    def charsmap(self) -> bytes:
        value = self.get("precompiled_charsmap")
        if value is None:
            return b""
        if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
            raise self.error("precompiled_charsmap", f"found {type(value).__name__}", "an array of bytes")
        array = np.asarray(value)
        if array.dtype.kind not in "iu":
            raise self.error("precompiled_charsmap", f"found {array.dtype}", "an array of bytes")
        blob = (array.astype(np.int64) & 0xFF).astype(np.uint8).tobytes()
        if len(blob) < 4 or 4 + int.from_bytes(blob[:4], "little") >= len(blob):
            raise self.error("precompiled_charsmap", f"found {len(blob)} bytes", "a trie of the length it states")
        return blob


def _special_tokens(
    texts: Sequence[str],
    ids: Mapping[str, int],
    types: Sequence[int],
    eos_id: int | None,
    named: Mapping[str, int | None],
) -> tuple[list[int], frozenset[int]]:
    """Bits of each token and the end-of-generation set, after llama.cpp's recognition of tokens by name."""
    attrs = list(types)
    found = dict(named)
    for key, names in {"eot": EOT_NAMES, "eom": ("<|eom_id|>",), **NAMED_SPECIALS}.items():
        if found[key] is None:
            found[key] = i = next((ids[name] for name in names if name in ids), None)
            if i is not None:
                attrs[i] |= CONTROL
    by_id = {i for key in ("fim_pad", "fim_rep", "fim_sep", "eot", "eom") if (i := found[key]) is not None}
    by_id |= set() if eos_id is None else {eos_id}
    ends, by_name, demoted, normal = end_of_generation(ids, by_id, texts)
    for i in by_name:
        attrs[i] |= CONTROL
    for name in OWN_SPACE_NAMES:
        if name in ids:
            attrs[ids[name]] = USER_DEFINED
    for i in demoted:
        attrs[i] = USER_DEFINED
    for i in normal:
        attrs[i] = NORMAL
    return attrs, ends


def _strip_attributes(
    metadata: Mapping[str, object], pre: str | None, ids: Mapping[str, int], attrs: list[int]
) -> None:
    """Tokens that swallow the white space around them; the file does not say so, llama.cpp goes by names."""
    name = str(metadata.get("general.name", "")).lower()
    architecture = str(metadata.get("general.architecture", ""))
    if any(x in (pre or "") for x in ("jina-v2-de", "jina-v2-es", "jina-v2-code")) or any(
        x in architecture for x in ("nomic-bert-moe", "jina-bert-v3")
    ):
        if "<mask>" in ids:
            attrs[ids["<mask>"]] |= LSTRIP
    elif "phi-3" in name or "phi3" in name:
        for i, attr in enumerate(attrs):
            if attr & (SPECIAL | USER_DEFINED):
                attrs[i] |= RSTRIP
        if "</s>" in ids:
            attrs[ids["</s>"]] |= RSTRIP
        for text in ("<unk>", "<s>", "<|endoftext|>"):
            if text in ids:
                attrs[ids[text]] &= ~RSTRIP
    elif "modern-bert" in name and "[MASK]" in ids:
        attrs[ids["[MASK]"]] |= LSTRIP
