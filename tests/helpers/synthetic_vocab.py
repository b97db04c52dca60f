"""Small vocabularies made for tests, GGUF files that hold them, and hard random text."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np

from oxjax.tokenizer import Tokenizer
from oxjax.tokenizer.bpe import byte_alphabet

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BYTES = [f"<0x{b:02X}>" for b in range(256)]

_WORDS_TEXT = """
the The and don't we'll I'VE it's he'd THEY'RE fooBar camelCaseWord snake_case hello World
你好世界 こんにちは 안녕하세요 привет Привет γειά naïve café cafe\u0301 e\u0301\u0302 ﬁne ½ ① Ⅳ １２３
123 1234567 3.14 0x1F 100,000 ... --- !!! ?! ;; == != <= -> => // # $x ^ ~ ` ' '' " “q” ‘s’ ’s … — 🦙
👨\u200d👩\u200d👧 🇩🇪 ไทย हिन्दी বাংলা العربية עברית ǅ ʰ ª ſ K İ ı ß ẞ \u200b \u00ad \ufeff \u0301
\U00020000 \ue000 \u0378 \U00016105 <dna> </dna> ACGTacgtAC IMGIMGABZ <sentinel:3>
<s> </s> [MASK] <mask> <|im_start|> <|endoftext|> <unk>
"""
_WORDS = _WORDS_TEXT.split()
_SPACES = [" "] * 4 + [
    "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n", "\n ", "\u00a0", "\u3000", "\u2028", "\x85", "\x0b", "\x1c", "",
    " '", " .", " ,", " ' ",
]  # fmt: skip
_PLANES = [(0, 0x24F), (0x250, 0x2FFF), (0x3000, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]


def random_text(rng: random.Random) -> str:
    """Words of many scripts, numbers, odd white space, lookalikes of special tokens and any code point at all."""
    out = []
    for _ in range(rng.randint(1, 14)):
        kind = rng.random()
        if kind < 0.55:
            out.append(rng.choice(_WORDS))
        elif kind < 0.65:
            out.append("".join(rng.choice("abcdeXYZ'st 1.é你") for _ in range(rng.randint(1, 8))))
        elif kind < 0.72:
            out.append(str(rng.randint(0, 10 ** rng.randint(1, 9))))
        elif kind < 0.80:
            out.append(chr(rng.randint(*rng.choice(_PLANES))))
        out.append(rng.choice(_SPACES) if rng.random() < 0.75 else "")
    return "".join(out)


def random_texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [random_text(rng) for _ in range(count)]


def metadata(model: str, tokens: list[str], *, types: list[int] | None = None, **keys: object) -> dict[str, object]:
    """The metadata of a vocabulary; further keys go under `tokenizer.ggml`."""
    named = {
        "model": model,
        "tokens": tokens,
        "token_type": np.array(types or [NORMAL] * len(tokens), np.int32),
        **keys,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in named.items() if value is not None}


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


@cache
def _strings(texts: tuple[str, ...]) -> bytes:
    return struct.pack("<IQ", 8, len(texts)) + b"".join(map(_string, texts))


def _value(value: object) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, list):
        return struct.pack("<I", 9) + _strings(tuple(value))
    kind = {"int32": 5, "float32": 6, "uint8": 0, "int8": 1}[value.dtype.name]
    return struct.pack("<IIQ", 9, kind, len(value)) + value.tobytes()


def write_gguf(path: Path, keys: Mapping[str, object]) -> Path:
    """A GGUF file of version 3 with these keys and no tensors."""
    keys = {"general.architecture": "llama", **keys}
    header = struct.pack("<4sIQQ", b"GGUF", 3, 0, len(keys))
    path.write_bytes(header + b"".join(_string(key) + _value(value) for key, value in keys.items()))
    return path


@cache
def pair_vocabulary() -> tuple[list[str], list[str]]:
    """A byte-level vocabulary that shows where a text was cut: most pairs of bytes merge if they are in one word."""
    alphabet = byte_alphabet()
    chosen = [*b" \n\r\t'.,!-<$\"`sStTrRevdDlLmaZfoB019", *range(0x80, 0xC0, 3), *range(0xC2, 0xF1, 3)]
    pairs = [(alphabet[a], alphabet[b]) for a in chosen for b in chosen]
    return alphabet + [a + b for a, b in pairs], [f"{a} {b}" for a, b in pairs]


@cache
def load(path: Path) -> Tokenizer:
    """The tokenizer of a data file, loaded once a session."""
    return Tokenizer.from_gguf(path)
