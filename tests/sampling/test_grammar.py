"""Grammars of every kind on vocabularies made for the case, and what is refused."""

import dataclasses
import json
import pickle

import numpy as np
import pytest

from oxjax.constrain import Grammar
from oxjax.constrain.grammar import MAX_SOURCE
from oxjax.constrain.matcher import GrammarCompiler
from oxjax.errors import GrammarError, GrammarStuckError, InvalidRequestError, RequestError
from oxjax.tokenizer import Tokenizer
from tests.helpers.grammar_walks import allowed_tokens, load, random_walk

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6
WORDS = [
    "yes",
    "no",
    "yes!",
    "!",
    "ye",
    "s",
    "nope",
    "▁yes",
    "a",
    "b",
    "c",
    "ab",
    "bc",
    "z",
    "日本",
    "日",
    "é",
    "aé",
    "\n",
]
EXTRA = [
    ("<unk>", 2),
    ("<s>", CONTROL),
    ("</s>", CONTROL),
    ("<|eot_id|>", CONTROL),
    ("<tool>", CONTROL),
    ("gone", UNUSED),
]


def tokenizer_of(words: list[str], extra: list[tuple[str, int]] = EXTRA) -> Tokenizer:
    """A SentencePiece vocabulary: special tokens, one for each byte, and words."""
    rows = [*extra, *((f"<0x{b:02X}>", BYTE) for b in range(256)), *((word, NORMAL) for word in words)]
    return Tokenizer.from_metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [text for text, _ in rows],
            "tokenizer.ggml.token_type": [kind for _, kind in rows],
        }
    )


TOKENIZER = tokenizer_of(WORDS)
ENDS = sorted(TOKENIZER.eog_ids)
COMPILER = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size + 50)


def ids(*texts: str) -> list[int]:
    return [TOKENIZER.id_of(text) for text in texts]


def follow(grammar: Grammar, *texts: str):
    return COMPILER.start(grammar, ids(*texts))


def next_texts(matcher) -> set[str]:
    """File texts of the allowed tokens, ends and single bytes left out."""
    found = {TOKENIZER.token_text(i) for i in np.flatnonzero(allowed_tokens(matcher)) if i not in TOKENIZER.eog_ids}
    return {text for text in found if not text.startswith("<0x")}


def next_ends(matcher) -> list[int]:
    mask = allowed_tokens(matcher)
    return [i for i in ENDS if mask[i]]


def test_two_ends_are_known():
    assert ids("</s>", "<|eot_id|>") == ENDS


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar.choice(["yes", "no"]),
        Grammar.gbnf('root ::= "yes" | "no"'),
        Grammar.regex("yes|no"),
        Grammar.lark('start: "yes" | "no"'),
    ],
    ids=lambda g: g.kind,
)
def test_yes_or_no(grammar):
    matcher = COMPILER.start(grammar)
    assert next_texts(matcher) == {"yes", "no", "ye"}
    assert not matcher.is_accepting and not matcher.is_done and next_ends(matcher) == []
    matcher.advance(*ids("ye"))
    assert next_texts(matcher) == {"s"}
    matcher.advance(*ids("s"))
    assert matcher.is_accepting and matcher.is_done
    assert np.flatnonzero(allowed_tokens(matcher)).tolist() == ENDS
    matcher.advance(ENDS[1])
    assert matcher.is_accepting and matcher.is_done and not matcher.mask().any()
    with pytest.raises(GrammarError, match="found the token"):
        matcher.advance(ENDS[1])


@pytest.mark.parametrize("texts", [["ye", "yes", "yes!"], ["yes!", "yes", "ye"]])
def test_a_choice_may_begin_another(texts):
    matcher = follow(Grammar.choice(texts), "ye")
    assert matcher.is_accepting and not matcher.is_done
    assert next_ends(matcher) == ENDS and next_texts(matcher) == {"s"}
    matcher.advance(*ids("s"))
    assert matcher.is_accepting and next_texts(matcher) == {"!"}
    assert follow(Grammar.choice(texts), "yes!").is_done


def test_choices_are_taken_literally():
    for text in ["a|b", "a.*", 'a"\n/\\', "日本", "[a]{2}", "\0"]:
        matcher = COMPILER.start(Grammar.choice([text]))
        for byte in text.encode():
            assert not matcher.is_accepting
            matcher.advance(*ids(f"<0x{byte:02X}>"))
        assert matcher.is_done


def test_all_alternatives_stay_open():
    grammar = Grammar.gbnf('root ::= "a" "b" | "a" "c"')
    assert follow(grammar, "a", "c").is_done and follow(grammar, "a", "b").is_done
    assert next_texts(follow(grammar, "a")) == {"b", "c"}


@pytest.mark.parametrize("recursion", ["", ' | "(" root ")"'])
def test_gbnf_is_not_greedy(recursion):
    """A longer match of one symbol does not hide a shorter one that the rest needs."""
    matcher = follow(Grammar.gbnf(f'root ::= word "z" | "ab" "z" "z"{recursion}\nword ::= [a-z]+'), "ab", "z")
    assert matcher.is_accepting and "z" in next_texts(matcher)


def test_left_recursion():
    matcher = follow(Grammar.gbnf('root ::= root "b" | root root | "a"'), "a", "b", "ab")
    assert matcher.is_accepting and next_texts(matcher) == {"a", "b", "ab"}


def test_first_rule_begins_where_there_is_no_root():
    assert follow(Grammar.gbnf('first ::= second\nsecond ::= "ab"'), "ab").is_done


def test_tokens_span_symbols_and_end_inside_characters():
    grammar = Grammar.gbnf('root ::= "a" [é日] "本"')
    assert {"a", "aé"} == next_texts(COMPILER.start(grammar))
    assert next_texts(follow(grammar, "a")) == {"日本", "日", "é"}
    matcher = follow(grammar, "a", "<0xE6>", "<0x97>")
    assert np.flatnonzero(allowed_tokens(matcher)).tolist() == ids("<0xA5>")


def test_only_text_is_text():
    everything = allowed_tokens(COMPILER.start(Grammar.gbnf("root ::= .*")))
    assert np.flatnonzero(everything[: len(EXTRA)]).tolist() == ENDS  # accepting; no other control or unused token
    assert not everything[TOKENIZER.vocab_size :].any()
    assert {"yes", "▁yes", "\n", "日本"} <= next_texts(COMPILER.start(Grammar.gbnf("root ::= .*")))
    assert next_texts(COMPILER.start(Grammar.gbnf('root ::= "<tool>" | "gone" | " yes"'))) == {"▁yes"}


def test_tokens_by_name():
    for grammar in [Grammar.gbnf('root ::= <tool> "a"'), Grammar.lark('start: <tool> "a"')]:
        assert next_texts(COMPILER.start(grammar)) == {"<tool>"}
        assert follow(grammar, "<tool>", "a").is_done
    with pytest.raises(GrammarError, match=r"<fool>.*no token of this vocabulary") as caught:
        COMPILER.start(Grammar.gbnf("root ::= <fool>"))
    assert (caught.value.line, caught.value.column) == (1, 10)


def test_a_vocabulary_without_an_end():
    tokenizer = Tokenizer.from_metadata({"tokenizer.ggml.model": "rwkv", "tokenizer.ggml.tokens": ["<s>", "a", "b"]})
    assert not tokenizer.eog_ids
    matcher = GrammarCompiler(tokenizer, tokenizer.vocab_size).start(Grammar.choice(["a", "ab"]))
    matcher.advance(tokenizer.id_of("a"))
    assert matcher.is_accepting and not matcher.is_done
    matcher.advance(tokenizer.id_of("b"))
    assert matcher.is_done and not matcher.mask().any()


@pytest.mark.parametrize("vocab_size", [len(EXTRA) + 256, TOKENIZER.vocab_size, TOKENIZER.vocab_size + 31, 4096])
def test_mask_has_a_bit_for_each_logit(vocab_size):
    mask = GrammarCompiler(TOKENIZER, vocab_size).start(Grammar.regex("[a-z]+")).mask()
    assert mask.dtype == np.uint32 and mask.shape == (-(-vocab_size // 32),) and not mask.flags.writeable
    bits = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    assert bits.max() < min(vocab_size, TOKENIZER.vocab_size)


def test_refused_tokens_change_nothing():
    grammar = Grammar.gbnf('root ::= ("ab" | "a" root "c")')
    matcher, twin = follow(grammar, "a"), follow(grammar, "a")
    for token in [*ids("c", "z", "<s>", "gone"), *ENDS, -1, TOKENIZER.vocab_size, 10**9]:
        with pytest.raises(GrammarError, match=f"found the token {token}"):
            matcher.advance(token)
        np.testing.assert_array_equal(matcher.mask(), twin.mask())
    matcher.advance(*ids("b"))
    assert matcher.is_done
    with pytest.raises(GrammarError):
        COMPILER.start(grammar, ids("a", "z"))


def test_copies_are_independent_and_replay_gives_the_same_masks(data):
    tokenizer, compiler = load(data / "vocab" / "ggml-vocab-llama-spm.gguf")
    grammar = Grammar.gbnf((data / "gbnf" / "json.gbnf").read_text())
    matcher = compiler.start(grammar)
    tokens, masks = random_walk(matcher, tokenizer, 3, 30)
    fork = matcher.copy()
    random_walk(fork, tokenizer, 4, 10)
    np.testing.assert_array_equal(allowed_tokens(matcher)[: tokenizer.vocab_size], masks[-1])
    for n in range(0, 31, 5):
        replayed = compiler.start(grammar, tokens[:n])
        np.testing.assert_array_equal(allowed_tokens(replayed)[: tokenizer.vocab_size], masks[n])


def test_plain_data():
    schema = {"properties": {"b": {}, "a": {}}}
    grammar = Grammar.json_schema(schema)
    assert list(json.loads(grammar.source)["properties"]) == ["b", "a"]  # their order is the output's
    assert Grammar.json_schema(json.dumps(schema)) == grammar and hash(Grammar.regex("a")) == hash(Grammar.regex("a"))
    assert Grammar(**json.loads(json.dumps(dataclasses.asdict(grammar)))) == grammar
    assert pickle.loads(pickle.dumps(grammar)) == grammar


@pytest.mark.parametrize("schema", [True, {}, {"type": ["integer", "null"]}, "{}"])
def test_schemas_of_any_form(schema):
    assert allowed_tokens(COMPILER.start(Grammar.json_schema(schema))).any()


def test_whitespace_in_json_is_bounded():
    matcher = follow(Grammar.json_schema({"type": "array"}), "<0x5B>", "\n")
    for _ in range(20):
        matcher.advance(*ids("<0x20>"))
    assert not allowed_tokens(matcher)[ids("<0x20>", "\n", "<0x09>")].any()


REFUSED = [
    (lambda: Grammar("xml", "a"), "kind: found 'xml'"),
    (lambda: Grammar.regex("a" * (MAX_SOURCE + 1)), "expected at most"),
    (lambda: Grammar.gbnf("root ::= \ud800"), "lone surrogate"),
    (lambda: Grammar.choice([]), "at least one"),
    (lambda: Grammar.choice(["a", ""]), "not empty"),
    (lambda: Grammar.choice(["\ud800"]), "lone surrogate"),
    (lambda: Grammar.choice("ab"), "expected a list"),
    (lambda: Grammar("choice", '"ab"'), "at least one"),
    (lambda: Grammar("json_schema", "[]"), "found list; expected an object or a boolean"),
    (lambda: Grammar.json_schema({"minimum": float("nan")}), "what JSON can write"),
    (lambda: Grammar.json_schema('{"minimum": NaN}'), "found NaN"),
    (lambda: Grammar.json_schema({"x-guidance": {"lenient": True}}), "x-guidance"),
]


@pytest.mark.parametrize("make,message", REFUSED)
def test_malformed_descriptions(make, message):
    with pytest.raises(GrammarError, match=message):
        make()


POSITIONS = [
    (Grammar.gbnf('root ::= "a"\n  b'), (2, 4), "'::='"),
    (Grammar.gbnf('root ::= "a" b'), (1, 14), "'b', which is no rule"),
    (Grammar.gbnf('root ::= ("a"\n | "b"'), (1, 10), "never closed"),
    (Grammar.gbnf('root ::= "a'), (1, 10), "never closed"),
    (Grammar.gbnf('x ::= "a"\nroot ::= [z-a]'), (2, 11), "in order"),
    (Grammar.gbnf("root ::= []"), (1, 10), "no characters"),
    (Grammar.gbnf('root ::= "\\q"'), (1, 11), "escape"),
    (Grammar.gbnf('root ::= "\\ud800"'), (1, 11), "code point"),
    (Grammar.gbnf('root ::= "a"{3,2}'), (1, 13), "lower bound"),
    (Grammar.gbnf('root ::= "a"{x}'), (1, 13), "expected {m}"),
    (Grammar.gbnf('root ::= * "a"'), (1, 10), "expected a symbol"),
    (Grammar.gbnf('root ::= "a" }'), (1, 14), "expected a symbol"),
    (Grammar.gbnf('root ::= "a"\nroot ::= "b"'), (2, 1), "second rule"),
    (Grammar.gbnf(" # nothing\n"), (2, 1), "no rule"),
    (Grammar.regex("a(b"), (1, 2), "unclosed group"),
    (Grammar.regex("(?=a)b"), (1, 1), "look-around"),
    (Grammar.lark('start: "a"\nb: ('), (2, 5), "Expected"),
    (Grammar.lark("start: b"), (1, 8), "unknown name"),
]


@pytest.mark.parametrize("grammar,position,message", POSITIONS)
def test_malformed_grammars_say_where(grammar, position, message):
    with pytest.raises(GrammarError, match=message) as caught:
        COMPILER.start(grammar)
    assert (caught.value.line, caught.value.column) == position
    assert isinstance(caught.value, InvalidRequestError)


EMPTY = [
    Grammar.json_schema(False),
    Grammar.json_schema({"not": {}}),
    Grammar.json_schema({"$ref": "#/$defs/none"}),
    Grammar.json_schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}),
    Grammar.json_schema({"type": "string", "format": "no such"}),
    Grammar.regex("[^\\x00-\\x{10FFFF}]"),
    Grammar.gbnf("root ::= root"),
]


@pytest.mark.parametrize("grammar", EMPTY, ids=lambda g: g.source)
def test_what_has_no_text_or_is_not_supported(grammar):
    with pytest.raises(GrammarError) as caught:
        COMPILER.start(grammar)
    assert caught.value.line is None


def test_a_dead_end_is_an_error_of_the_request():
    matcher = follow(Grammar.gbnf('root ::= "a" [^\\x00-\\U0010FFFF] | "b"'))
    with pytest.raises(GrammarError):  # not even the first token: no text goes on after it
        matcher.advance(*ids("a"))
    few = tokenizer_of(["a"], EXTRA[:3])
    compiler = GrammarCompiler(few, 3)  # a model that has logits for special tokens only
    with pytest.raises(GrammarError, match="no token"):
        compiler.start(Grammar.choice(["a"]))
    assert not issubclass(GrammarStuckError, InvalidRequestError) and issubclass(GrammarStuckError, RequestError)
