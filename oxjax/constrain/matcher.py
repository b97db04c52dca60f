"""Masks of the tokens that a grammar allows next, by llguidance: an Earley parser over a trie of the vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import UInt32
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark

from oxjax.constrain.gbnf import gbnf_to_lark
from oxjax.constrain.grammar import Grammar
from oxjax.errors import GrammarError, GrammarStuckError
from oxjax.tokenizer import Tokenizer

# What a grammar may cost at most, in memory and time: hundreds of megabytes and seconds, whatever it says.
_LIMITS = LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=1_000_000,
    max_lexer_states=50_000,
    max_grammar_size=20_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)
# Any tokens that spell an allowed text, not just those that the tokenizer would choose for it.
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'
_WHITESPACE = r" |\n[ \t]{0,20}"  # as in llama.cpp's JSON grammars; without a bound, a model may never stop
_POSITION = re.compile(r"(?:at )?(\d+)\((\d+)\): ")
_REGEX_ERROR = re.compile(r"regex parse error:\n    .*\n    ( *)\^.*\n?(?:error: (.*))?")


class GrammarCompiler:
    """Starts matchers of grammars over one vocabulary. Built once for a model.

    A token stands for its bytes. Control tokens and tokens without bytes are not allowed, unless a grammar names the
    token. Tokens that end a generation are allowed where the text is complete, and only there.

    Args:
        tokenizer: of the model.
        vocab_size: number of logits of the model; ids that the tokenizer lacks are never allowed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.vocab_size = vocab_size
        self._id_of = tokenizer.id_of
        size = min(tokenizer.vocab_size, vocab_size)
        ends = {i for i in tokenizer.eog_ids if i < size}
        tokens = []
        for i, piece in enumerate(tokenizer.vocab_bytes()[:size]):
            # llguidance marks what is not text with 0xFF, a byte that UTF-8 does not have.
            is_text = not (tokenizer.is_special(i) or i in ends)
            tokens.append((b"" if piece.startswith(b"\xff") else piece) if is_text else b"\xff" + piece)
        self.usable = _pack([bool(t) and i not in ends for i, t in enumerate(tokens)], vocab_size)
        self.ends = _pack([i in ends for i in range(size)], vocab_size)
        # It wants a token for the end of its own; which ones end a text, and when, is decided in `mask`.
        self.tokenizer = LLTokenizer(TokenizerWrapper(_Pieces([*tokens, b"\xff<end of text>"])), eos_token=size)

    def start(self, grammar: Grammar, tokens: Iterable[int] = ()) -> Matcher:
        """Start a matcher at the beginning of a text, or after the tokens of one.

        Args:
            grammar: the language.
            tokens: generated so far; the state is the same as after advancing by each of them.

        Raises:
            GrammarError: the grammar is malformed, unsupported or too expensive, or no token of this vocabulary can
                begin a text of it; or the tokens do not match it.
            GrammarStuckError: following the tokens became too expensive.
        """
        engine = LLMatcher(self.tokenizer, self._lark(grammar) + _OPTIONS, limits=_LIMITS, log_level=0)
        if engine.is_error():
            raise _error(grammar, engine.get_error())
        matcher = Matcher(self, engine)
        try:
            matcher.mask()
        except GrammarStuckError as error:
            raise GrammarError(f"{grammar.kind}: {error}") from None
        for token in tokens:
            matcher.advance(token)
        return matcher

    def _lark(self, grammar: Grammar) -> str:
        match grammar.kind:
            case "gbnf":
                return gbnf_to_lark(grammar.source, self._id_of)
            case "json_schema":
                schema = json.loads(grammar.source)
                schema = schema if isinstance(schema, dict) else {"anyOf": [schema]}
                return "start: %json " + json.dumps({"x-guidance": {"whitespace_pattern": _WHITESPACE}, **schema})
            case "regex":
                return f"start: /{regex_to_lark(grammar.source, '')}/"
            case "choice":
                texts = ("".join(f"\\x{{{ord(c):x}}}" for c in text) for text in json.loads(grammar.source))
                return f"start: /{'|'.join(texts)}/"
        return grammar.source


class _Pieces:
    """Tokenizer interface for llguidance. It never encodes text, because no token is forced."""

    bos_token_id = None
    special_token_ids = ()

    def __init__(self, tokens: list[bytes]):
        self.tokens, self.eos_token_id = tokens, len(tokens) - 1

    def __call__(self, text: bytes) -> list[int]:
        return []


class Matcher:
    """State of a grammar after the tokens of a text.

    The state depends on the grammar and the tokens alone: `GrammarCompiler.start` with the same ones returns it again.
    """

    def __init__(self, compiler: GrammarCompiler, engine: LLMatcher, has_ended: bool = False):
        self._compiler, self._engine, self._has_ended = compiler, engine, has_ended
        self._mask: UInt32[np.ndarray, " words"] | None = None

    @property
    def is_accepting(self) -> bool:
        """True if the text may end here, or has ended."""
        return self._has_ended or self._engine.is_accepting()

    @property
    def is_done(self) -> bool:
        """True if the text is complete and only its end can follow.

        A vocabulary without an end token has an empty mask then, so the caller must check this to stop.

        Raises:
            GrammarStuckError: as for `mask`.
        """
        return self._has_ended or (self.is_accepting and not (self.mask() & ~self._compiler.ends).any())

    def mask(self) -> UInt32[np.ndarray, " words"]:
        """Bit mask of the tokens that may follow: token i is bit i % 32 of word i // 32 of ceil(vocab_size / 32).

        Read-only; empty after the end.

        Raises:
            GrammarStuckError: no token of the vocabulary is allowed, or finding them exceeds a limit.
        """
        if self._mask is None:
            self._mask = self._compute_mask()
            self._mask.flags.writeable = False
        return self._mask

    def _compute_mask(self) -> UInt32[np.ndarray, " words"]:
        compiler = self._compiler
        if self._has_ended:
            return np.zeros_like(compiler.usable)
        found = self._engine.compute_bitmask()
        if self._engine.is_error() and not self._engine.get_error().startswith("NoExtension"):
            raise GrammarStuckError(f"finding the next tokens is too expensive: {_first_line(self._engine)}")
        mask = np.zeros(4 * len(compiler.usable), np.uint8)
        count = min(len(found), len(mask))
        mask[:count] = np.frombuffer(found, np.uint8, count)
        mask = mask.view("<u4").astype(np.uint32, copy=False) & compiler.usable
        if self._engine.is_accepting():
            return mask | compiler.ends
        if self._engine.is_error() or not mask.any():
            raise GrammarStuckError("the text is not complete, and no token of the vocabulary leads on")
        return mask

    def advance(self, token: int) -> None:
        """Advance by one token.

        Raises:
            GrammarError: the token is not allowed here; nothing was changed.
            GrammarStuckError: as for `mask`.
        """
        if not (0 <= token < self._compiler.vocab_size and self.mask()[token // 32] >> (token % 32) & 1):
            raise GrammarError(f"found the token {token}; expected one that the grammar allows here")
        if self._compiler.ends[token // 32] >> (token % 32) & 1:
            self._has_ended = True
        elif not self._engine.consume_token(token):
            raise GrammarStuckError(f"following the token {token} is too expensive: {_first_line(self._engine)}")
        self._mask = None

    def copy(self) -> Matcher:
        """Matcher in the same state, for another continuation."""
        return Matcher(self._compiler, self._engine.deep_copy(), self._has_ended)


def _pack(bits: Sequence[bool], vocab_size: int) -> UInt32[np.ndarray, " words"]:
    padded = np.zeros(-(-vocab_size // 32) * 32, bool)
    padded[: len(bits)] = bits
    return np.packbits(padded, bitorder="little").view("<u4").astype(np.uint32, copy=False)


def _first_line(engine: LLMatcher) -> str:
    return engine.get_error().partition("\n")[0]


def _error(grammar: Grammar, message: str) -> GrammarError:
    """The engine's message, which says the line and column in the text that it was given."""
    line = column = None
    reason = message.partition("\n")[0]
    if grammar.kind == "lark" and (found := _POSITION.match(reason)):
        line, column, reason = int(found[1]), int(found[2]), reason[found.end() :]
    if grammar.kind == "regex" and (found := _REGEX_ERROR.search(message)):
        reason = found[2] or reason
        if not set("/\n") & set(grammar.source):
            line, column = 1, len(found[1]) + 1
    reason = _POSITION.sub("", reason).removeprefix("failed to compile JSON schema: ")
    return GrammarError(f"{grammar.kind}: {reason}", line=line, column=column)
