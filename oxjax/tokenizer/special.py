"""Special tokens: end-of-generation tokens, and splitting of texts at the special tokens in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# Names by which llama.cpp finds tokens that the metadata does not point at; the first one present counts.
EOT_NAMES = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>",
    "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>",
)  # fmt: skip
NAMED_SPECIALS = {
    "fim_pre": (
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
        "<|prefix|>",
    ),
    "fim_suf": (
        "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>",
        "<|suffix|>",
    ),
    "fim_mid": (
        "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>",
        "<|middle|>",
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}  # fmt: skip
_END_NAMES = (
    *EOT_NAMES, "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "</s>", "<|eom_id|>", "[EOS]", "<eos>", "<turn|>",
    "<|tool_response>", "[e~[",
)  # fmt: skip
# gpt-oss writes these around every message and a reader needs to see them.
OWN_SPACE_NAMES = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


def end_of_generation(
    ids: Mapping[str, int], by_id: Iterable[int], texts: Sequence[str]
) -> tuple[frozenset[int], frozenset[int], frozenset[int], frozenset[int]]:
    """Find the tokens that end a generation.

    Args:
        ids: text -> id.
        by_id: end tokens according to the metadata or another name.
        texts: id -> text.

    Returns:
        the set; tokens found by name; tokens removed because the file has better ones (they become user defined);
        tokens removed because they are ordinary text in this vocabulary.
    """
    by_name = frozenset(ids[name] for name in _END_NAMES if name in ids)
    ends = by_name | frozenset(by_id)
    names = {texts[i] for i in ends}
    demoted, normal = set(), set()
    call = bool(names & {"<|call|>", "<|calls|>"})
    if "<|end|>" in names and call and names & {"<|return|>", "<|flush|>"}:
        demoted.add(ids["<|end|>"])
    if "</s>" in names and names & {"<|tool_response>", "<|plamo:eos|>"}:
        normal.add(ids["</s>"])
    return ends - demoted - normal, by_name, frozenset(demoted), frozenset(normal)


@dataclass(frozen=True)
class SpecialToken:
    """Token that is searched for in a text before the text is encoded."""

    id: int
    text: str
    control: bool
    lstrip: bool
    rstrip: bool


_SPACE = " \t\n\v\f\r"


class SpecialMatcher:
    """Cuts a text at special tokens the way llama.cpp does: the longest token everywhere first, then the next.

    First one pass finds which tokens occur at all, by the first two characters of each: vocabularies have thousands
    of special tokens and a text has a few.
    """

    def __init__(self, tokens: Iterable[SpecialToken]):
        by_size = sorted(tokens, key=lambda t: -len(t.text.encode("utf-8", "surrogateescape")))
        self._tokens = {t.text: t for t in by_size}
        self._order = {text: i for i, text in enumerate(self._tokens)}
        self._heads: dict[str, dict[int, set[str]]] = {}
        for text in self._tokens:
            self._heads.setdefault(text[:2], {}).setdefault(len(text), set()).add(text)
        heads = "|".join(re.escape(head) for head in sorted(self._heads, key=len, reverse=True))
        self._places = re.compile(f"(?={heads})") if heads else None

    def _present(self, text: str) -> list[SpecialToken]:
        """The tokens that occur in a text, in the order in which they are to be cut out."""
        if self._places is None:
            return []
        found: set[str] = set()
        # What is still to be looked for, by its first two characters, then by its length.
        wanted: dict[str, dict[int, set[str]]] = {}
        for match in self._places.finditer(text):
            at = match.start()
            for head in dict.fromkeys((text[at : at + 2], text[at])):
                if head not in wanted:
                    wanted[head] = {n: set(texts) for n, texts in self._heads.get(head, {}).items()}
                for length, texts in list(wanted[head].items()):
                    piece = text[at : at + length]
                    if piece in texts:
                        found.add(piece)
                        texts.remove(piece)
                        if not texts:
                            del wanted[head][length]
        return [self._tokens[piece] for piece in sorted(found, key=self._order.__getitem__)]

    def split(self, text: str, parse_special: bool) -> list[str | int]:
        """Texts between special tokens, and the ids of those tokens, in order; no text is empty.

        Args:
            text: any text.
            parse_special: also cut at control and unknown tokens, not only at user-defined ones.
        """
        pieces: list[str | int] = [text] if text else []
        for token in self._present(text):
            if parse_special or not token.control:
                pieces = [x for piece in pieces for x in (_cut(piece, token) if isinstance(piece, str) else (piece,))]
        return pieces


def _cut(text: str, token: SpecialToken) -> list[str | int]:
    first, *rest = text.split(token.text)
    if not rest:
        return [text]
    out: list[str | int] = [first.rstrip(_SPACE) if token.lstrip else first]
    for i, part in enumerate(rest, 1):
        right = part.lstrip(_SPACE) if token.rstrip else part
        out += [token.id, right.rstrip(_SPACE) if token.lstrip and i < len(rest) else right]
    return [x for x in out if x != ""]
