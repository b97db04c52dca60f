r"""Pre-tokenisers of byte-level BPE: the split of a text into words, for every `tokenizer.ggml.pre`.

The names, the expressions behind them and the settings that go with them are llama.cpp's (`llama-vocab.cpp`),
which are in turn those of each model's `tokenizer.json`. Expressions are applied one after the other, each to
the pieces that the one before left; what an expression does not match stays a piece.

Written for Oniguruma with these changes: `\p{...}` stands for the Unicode 15.1 ranges of `unicode.py`; `\p{U}`
and `\p{W}` are letters but a-z, and letters but A-Z; white space beyond ASCII is `\s` and in no other class.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split

from oxjax.errors import UnknownPreTokenizerError
from oxjax.tokenizer.unicode import ranges, regex_ranges, subtract

_CONTRACTION = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_ASCII_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_CJK = r"[\x{4e00}-\x{9fa5}\x{3040}-\x{30ff}]+"
_CJK_WIDE = r"[\x{800}-\x{9fa5}\x{ac00}-\x{d7ff}&&\S]+"
_HAN = (
    r"\x{3400}-\x{4dbf}\x{4e00}-\x{9fff}\x{f900}-\x{faff}\x{20000}-\x{2a6df}\x{2a700}-\x{2ebef}"
    r"\x{2f800}-\x{2fa1f}"
)
# Digits in threes from the right. The second form is the rest of a run whose first group was cut off.
_THREES = r"(?<!\p{N})\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))|(?<=\p{N})\p{N}{3}"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}"
_DEEPSEEK3 = (
    rf"{_ASCII_PUNCTUATION}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_BLOOM = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{ff0c}\x{3001}\x{964}\x{6d4}\x{60c})]+"


def _cased(upper: str, lower: str, suffix: str, digits: str) -> str:
    """Words that end where lower case turns into upper case, with an optional contraction at their end."""
    prefix = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{prefix}[{upper}]*[{lower}]+{suffix}|{prefix}[{upper}]+[{lower}]*{suffix}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_GPT4O = _cased(r"\p{U}", r"\p{W}", f"{_CONTRACTION}?", r"\p{N}{1,3}")

_DEEPSEEK_LLM_LETTERS = (
    r"A-Za-z\x{b5}\x{c0}-\x{d6}\x{d8}-\x{f6}\x{f8}-\x{1ba}\x{1bc}-\x{1bf}\x{1c4}-\x{293}\x{295}-\x{2af}"
    r"\x{370}-\x{373}\x{376}\x{377}\x{37b}-\x{37d}\x{37f}\x{386}\x{388}-\x{38a}\x{38c}\x{38e}-\x{3a1}"
    r"\x{3a3}-\x{3f5}\x{3f7}-\x{481}\x{48a}-\x{52f}\x{531}-\x{556}\x{10a0}-\x{10c5}\x{13a0}-\x{13f5}"
    r"\x{13f8}-\x{13fd}\x{1c90}-\x{1cba}\x{1cbd}-\x{1cbf}\x{1d00}-\x{1d2b}\x{1d6b}-\x{1d77}\x{1d79}-\x{1d9a}"
    r"\x{1e00}-\x{1f15}\x{1f18}-\x{1f1d}\x{1f20}-\x{1f45}\x{1f48}-\x{1f4d}\x{1f50}-\x{1f57}\x{1f59}\x{1f5b}"
    r"\x{1f5d}\x{1f5f}-\x{1f7d}\x{1f80}-\x{1fb4}\x{1fb6}-\x{1fbc}\x{1fbe}\x{1fc2}-\x{1fc4}\x{1fc6}-\x{1fcc}"
    r"\x{1fd0}-\x{1fd3}\x{1fd6}-\x{1fdb}\x{1fe0}-\x{1fec}\x{1ff2}-\x{1ff4}\x{1ff6}-\x{1ffc}\x{2102}\x{2107}"
    r"\x{210a}-\x{2113}\x{2115}\x{2119}-\x{211d}\x{2124}\x{2126}\x{2128}\x{212a}-\x{212d}\x{212f}-\x{2134}"
    r"\x{2139}\x{213c}-\x{213f}\x{2145}-\x{2149}\x{214e}\x{2183}\x{2184}\x{2c00}-\x{2c7b}\x{2c7e}-\x{2ce4}"
    r"\x{2ceb}-\x{2cee}\x{2cf2}\x{2cf3}\x{a640}-\x{a66d}\x{a680}-\x{a69b}\x{a722}-\x{a76f}\x{a771}-\x{a787}"
    r"\x{a78b}-\x{a78e}\x{ab70}-\x{abbf}\x{fb00}-\x{fb06}\x{fb13}-\x{fb17}\x{ff21}-\x{ff3a}\x{ff41}-\x{ff5a}"
    r"\x{10400}-\x{1044f}\x{104b0}-\x{104d3}\x{104d8}-\x{104fb}\x{10c80}-\x{10cb2}\x{10cc0}-\x{10cf2}"
    r"\x{118a0}-\x{118df}\x{1e900}-\x{1e943}"
)
_YOUTU_CJK = (
    r"[\x{ac00}-\x{d7a3}\x{3131}-\x{318e}]+|[\x{ff01}\x{2026}\x{201c}\x{201d}\x{2018}\x{2019}\x{2014}\x{ff1a}"
    r"\x{ff1b}\x{ff0c}\x{3001}-\x{303f}\x{fe30}-\x{fe4f}]+|[\x{3105}-\x{312f}]+|" + _CJK
)
_AFMOE_ASIAN = (
    r"[\x{4e00}-\x{9fff}\x{3400}-\x{4dbf}\x{8c48}-\x{faff}\x{3040}-\x{30ff}\x{ff65}-\x{ff9f}\x{2f00}-\x{2fdf}"
    r"\x{e40}-\x{eff}\x{1780}-\x{17ff}\x{1000}-\x{109f}\x{aa60}-\x{aa7f}\x{a9e0}-\x{a9ff}\x{ac00}-\x{d7af}"
    r"\x{1100}-\x{11ff}]+"
)
_LINES = r"[^\n]+|\n+"


@dataclass(frozen=True)
class PreTokenizerSpec:
    r"""One way to cut, with the settings that llama.cpp ties to its name.

    Attributes:
        patterns: Oniguruma expressions, `\p{...}` not yet replaced.
        digits_join: the first expression's matches that follow text are joined to it (llama.cpp's digit groups).
        byte_level: words are spelled in GPT-2's byte alphabet; if False, in plain UTF-8 with `<0xXX>` fallback.
        ignore_merges: a whole word that is a token is that token.
        newline_words: a run of newlines that is a token is that token.
        add_bos, add_sep, no_bos: defaults for the vocabulary; no_bos: there is no default BOS id.
        clean_spaces: decoding drops spaces before punctuation.
        escape_whitespaces: spaces are U+2581 in token texts.
        lowercase: default of `normalizer.lowercase`.
    """

    patterns: tuple[str, ...]
    digits_join: bool = False
    byte_level: bool = True
    ignore_merges: bool = False
    newline_words: bool = False
    add_bos: bool = False
    add_sep: bool = False
    no_bos: bool = False
    clean_spaces: bool = True
    escape_whitespaces: bool = False
    lowercase: bool = True


_gpt2 = PreTokenizerSpec((_GPT2,))
_gpt2_sep = replace(_gpt2, add_sep=True)
_gpt2_keep = replace(_gpt2, clean_spaces=False)
_llama3 = PreTokenizerSpec((_LLAMA3,))
_llama3_bos = replace(_llama3, ignore_merges=True, add_bos=True)
_glm = replace(_llama3, no_bos=True)
_qwen2 = PreTokenizerSpec((_QWEN2,), clean_spaces=False)
_starcoder = PreTokenizerSpec((r"\p{N}", _GPT2))
_starcoder_keep = replace(_starcoder, clean_spaces=False)
_bloom = PreTokenizerSpec((_BLOOM,))
_deepseek3 = PreTokenizerSpec((r"\p{N}{1,3}", _CJK, _DEEPSEEK3), clean_spaces=False)
_gpt4o = PreTokenizerSpec((_GPT4O,), clean_spaces=False)
_tiny_aya = replace(_gpt4o, patterns=(_THREES, _cased(r"\p{L}\p{M}", r"\p{L}\p{M}", f"{_CONTRACTION}?", r"\p{N}{1,3}")),
                    digits_join=True)  # fmt: skip
_bailing = PreTokenizerSpec(
    (rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}|\p{{N}}|{_SYMBOLS}|\s*[\r\n]|\s+(?!\S)|\s+",),
    clean_spaces=False,
)
_gemma4 = PreTokenizerSpec((_LINES,), byte_level=False, newline_words=True, escape_whitespaces=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizerSpec] = {
    "default": PreTokenizerSpec((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(
        ("gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum",
         "modern-bert", "mpt", "olmo", "jais", "exaone4"), _gpt2),
    **dict.fromkeys(("jina-v1-en", "jina-v2-code", "roberta-bpe"), _gpt2_sep),
    **dict.fromkeys(("trillion", "granite-docling"), _gpt2_keep),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        _llama3_bos),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _llama3),
    "chatglm-bpe": _glm,
    **dict.fromkeys(("glm4", "glm5"), replace(_glm, ignore_merges=True)),
    "jais-2": PreTokenizerSpec((
        rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|\s*[\r\n]+|"
        + "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s",)),
    "minicpm5": PreTokenizerSpec(
        (r"\p{N}{1,3}", rf"{_CONTRACTION}|{_WORD}|\p{{N}}+|{_SYMBOLS}|{_SPACES}"), ignore_merges=True),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "hunyuan", "solar-open", "grok-2"), _qwen2),
    **dict.fromkeys(("megrez", "stablelm2"), replace(_qwen2, clean_spaces=True)),
    "qwen35": replace(_qwen2, patterns=(
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",)),
    "ufakzeka": replace(_qwen2, patterns=(rf"{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}",)),
    "laguna": replace(_qwen2, patterns=(_LINES, _QWEN2)),
    "seed-coder": replace(_qwen2, patterns=(
        rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)),
    "exaone-moe": PreTokenizerSpec((
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",)),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), _bailing),
    **dict.fromkeys(("starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"), _starcoder),
    **dict.fromkeys(("command-r", "smollm"), _starcoder_keep),
    "falcon": PreTokenizerSpec((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    **dict.fromkeys(("bloom", "gpt3-finnish"), _bloom),
    "poro-chat": replace(_bloom, clean_spaces=False),
    "viking": PreTokenizerSpec((_BLOOM, r"\p{N}"), clean_spaces=False),
    "deepseek-llm": PreTokenizerSpec((
        r"[\r\n]", rf"\s?[{_DEEPSEEK_LLM_LETTERS}]+",
        r"\s?[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3001}-\x{3002}]+",
        r"\s+\z", _CJK_WIDE, r"\p{N}+"), clean_spaces=False),
    "deepseek-coder": PreTokenizerSpec(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_WIDE, r"\p{N}"), clean_spaces=False),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), _deepseek3),
    "spark2_5": replace(_deepseek3, patterns=(
        r"\p{N}{1,3}", _CJK,
        rf"{_ASCII_PUNCTUATION}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+|[\r\n]"
        r"|\s+(?!\S)|\s+",
        r"\p{N}")),
    "afmoe": replace(_deepseek3, patterns=(_THREES, _AFMOE_ASIAN, _DEEPSEEK3), digits_join=True),
    "youtu": PreTokenizerSpec(
        (_YOUTU_CJK, _cased(r"\p{L}\p{M}", r"\p{L}\p{M}", f"{_CONTRACTION}?", r"\p{N}")),
        clean_spaces=False, ignore_merges=True),
    "tekken": PreTokenizerSpec(
        (_cased(r"\p{U}", r"\p{W}", "", r"\p{N}"),), clean_spaces=False, ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _gpt4o),
    "granite-embed-multi-97m": PreTokenizerSpec(
        (_cased(r"\p{U}\p{M}", r"\p{W}\p{M}", f"{_CONTRACTION}?", r"\p{N}{1,3}"),),
        clean_spaces=False, ignore_merges=True),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), _tiny_aya),
    "kimi-k2": PreTokenizerSpec((
        rf"[{_HAN}]+|[^\r\n\p{{L}}\p{{N}}]?(?:(?![{_HAN}])\p{{L}})+{_CONTRACTION}?|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}",),
        clean_spaces=False),
    "superbpe": PreTokenizerSpec((r"\p{N}+", r"(?=([0-9]{3})+(?![0-9]))"), clean_spaces=False),
    "chameleon": PreTokenizerSpec((
        r"<sentinel:[0-9]+>", r"IMGIMG[A-I]{1,4}Z", r"[\t\n]|    |  ", r"\p{N}", r"[\p{P}!-/:-@\[-`{-~]", _GPT2),
        add_bos=True, clean_spaces=False),
    **dict.fromkeys(("gemma4", "granite-embed-multi-311m"), _gemma4),
    "sarvam-moe": replace(_gemma4, newline_words=False, clean_spaces=False),
    "whitespace": PreTokenizerSpec((r"\S+",), byte_level=False, lowercase=False),
}  # fmt: skip


def pre_tokenizer(name: str, source: str) -> PreTokenizerSpec:
    """Pre-tokeniser by name.

    Args:
        name: `tokenizer.ggml.pre`.
        source: the file, for the message.

    Raises:
        UnknownPreTokenizerError: no such name. Guessing one would give plausible, wrong token ids.
    """
    if name not in PRE_TOKENIZERS:
        raise UnknownPreTokenizerError(
            f"{source}: tokenizer.ggml.pre: found {name!r}, which no pre-tokeniser is known by; expected one of "
            + ", ".join(sorted(PRE_TOKENIZERS))
        )
    return PRE_TOKENIZERS[name]


@cache
def _category(letter: str) -> str:
    if letter in "UW":
        return regex_ranges(subtract(ranges("L"), *map(ord, "az" if letter == "U" else "AZ")))
    return regex_ranges(ranges(letter))


def expand(pattern: str) -> str:
    r"""The expression with every `\p{X}` replaced by its ranges, in brackets where it stands alone."""
    out, inside = [], False
    for piece in re.findall(r"\\p\{[A-Z]\}|\\.|.", pattern, re.DOTALL):
        if piece.startswith(r"\p{"):
            out.append(_category(piece[3]) if inside else f"[{_category(piece[3])}]")
            continue
        inside = {"[": True, "]": False}.get(piece, inside)
        out.append(piece)
    return "".join(out)


def build(spec: PreTokenizerSpec) -> PreTokenizer:
    """The spec as a pre-tokeniser of the `tokenizers` library, byte alphabet included."""
    steps: list[PreTokenizer] = [
        Split(Regex(expand(pattern)), "merged_with_previous" if spec.digits_join and i == 0 else "isolated")
        for i, pattern in enumerate(spec.patterns)
    ]
    if spec.byte_level:
        steps.append(ByteLevel(add_prefix_space=False, use_regex=False))
    return Sequence(steps)
