"""Reading the metadata: what is refused, special tokens by id and by name, cutting texts at them."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oxjax.errors import TokenizerError
from oxjax.tokenizer import Tokenizer
from oxjax.tokenizer.special import SpecialMatcher, SpecialToken
from tests.helpers.oracle import LlamaCpp
from tests.helpers.synthetic_vocab import CONTROL, NORMAL, USER_DEFINED, metadata, pair_vocabulary, write_gguf

GOOD = metadata("llama", ["<unk>", "<s>", "</s>", "a"], scores=np.zeros(4, np.float32))
BPE = metadata("gpt2", ["a", "b", "ab"], pre="gpt-2", merges=["a b"], bos_token_id=0, eos_token_id=0)


@pytest.mark.parametrize(
    ("base", "key", "value", "message"),
    [
        (GOOD, "model", None, "missing; expected a string"),
        (GOOD, "model", 3, "found int; expected a string"),
        (GOOD, "tokens", None, "missing; expected an array of strings"),
        (GOOD, "tokens", [], "found no tokens"),
        (GOOD, "tokens", ["a", "b", "a", "c"], "found 'a' as 0 and as 2"),
        (GOOD, "tokens", np.zeros(4), "expected an array of strings"),
        (GOOD, "scores", np.zeros(3, np.float32), "found 3 entries; expected 4"),
        (GOOD, "scores", "no", "expected an array of numbers"),
        (GOOD, "token_type", np.ones(5, np.int32), "found 5 entries; expected 4"),
        (GOOD, "token_type", np.ones(4, np.float32), "expected integers"),
        (GOOD, "eos_token_id", "x", "expected a token id"),
        (GOOD, "padding_token_id", 1.5, "expected a token id"),
        (GOOD, "add_bos_token", 1, "found 1; expected a boolean"),
        (BPE, "merges", None, "missing; expected an array of strings"),
        (BPE, "merges", ["a b", "ab"], "entry 1 is 'ab'; expected two pieces"),
        (BPE, "merges", [" a"], "entry 0 is ' a'; expected two pieces"),
        (
            {**GOOD, "tokenizer.ggml.model": "t5"},
            "precompiled_charsmap",
            np.array([9, 0, 0, 0, 1], np.uint8),
            "5 bytes",
        ),
        ({**GOOD, "tokenizer.ggml.model": "t5"}, "precompiled_charsmap", "x", "expected an array of bytes"),
        ({**GOOD, "tokenizer.ggml.model": "bert"}, "seperator_token_id", None, "missing"),
        ({**GOOD, "tokenizer.ggml.model": "plamo2"}, "tokens", ["a"] * 1 + ["b", "c", "d"], "<0x00>"),
    ],
)
def test_malformed_metadata(base, key, value, message):
    keys = {**base, f"tokenizer.ggml.{key}": value}
    if value is None:
        del keys[f"tokenizer.ggml.{key}"]
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_metadata(keys, "file.gguf")
    assert "file.gguf" in str(caught.value)
    assert f"tokenizer.ggml.{key}" in str(caught.value) or key == "seperator_token_id"


def test_charsmap_that_points_outside_itself():
    blob = np.frombuffer(np.array([4, 0xFFFFF << 10], "<u4").tobytes() + b"x\0", np.uint8)
    keys = {**GOOD, "tokenizer.ggml.model": "t5", "tokenizer.ggml.precompiled_charsmap": blob}
    with pytest.raises(TokenizerError, match="points outside"):
        Tokenizer.from_metadata(keys).encode("a")


def test_defaults_and_absent_ids():
    t = Tokenizer.from_metadata({**GOOD, "tokenizer.ggml.padding_token_id": 0xFFFFFFFF})
    assert (t.bos_id, t.eos_id, t.unk_id, t.sep_id, t.pad_id) == (1, 2, 0, None, None)
    assert (t.add_bos, t.add_eos, t.add_space_prefix, t.vocab_size) == (True, False, True, 4)
    assert (t.model, t.pre, t.id_of("a"), t.id_of("zz"), t.token_text(3)) == ("llama", None, 3, None, "a")
    assert t.token_bytes(3) == t.vocab_bytes()[3] == b"a"
    assert (
        Tokenizer.from_metadata({**GOOD, "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", ""]}).id_of("[EMPTY_3]") == 3
    )


def test_an_id_past_the_end_is_reported_and_the_default_taken(caplog):
    """As llama.cpp does: published files give a padding token one past the end."""
    t = Tokenizer.from_metadata(
        {**GOOD, "tokenizer.ggml.padding_token_id": 4, "tokenizer.ggml.bos_token_id": 99}, source="model.gguf"
    )
    assert (t.pad_id, t.bos_id) == (None, 1)
    assert "model.gguf: tokenizer.ggml.padding_token_id is 4 of 4 tokens: using None" in caplog.messages


NAMES = [
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<EOT>", "<|eom_id|>", "<eos>", "</s>",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|return|>", "<|call|>", "<|flush|>", "<turn|>", "[e~[",
    "<|tool_response>", "<|channel|>", "<|fim_prefix|>", "<｜end▁of▁sentence｜>", "<|im_start|>", "plain",
]  # fmt: skip


@pytest.mark.parametrize(
    "names",
    [
        NAMES,
        NAMES[:8],
        NAMES[:11],
        ["<|end|>", "<|return|>", "<|call|>"],
        ["<|end|>", "</s>"],
        ["</s>", "<|tool_response>"],
    ],
)
def test_ends_of_generation_are_llama_cpps(names, tmp_path):
    tokens, merges = pair_vocabulary()
    keys = metadata("gpt2", tokens + names, pre="qwen2", merges=merges, eos_token_id=5)
    t = Tokenizer.from_metadata(keys)
    texts = [f"a {x}b{y} c" for x in names for y in names[:4]]
    with LlamaCpp(write_gguf(tmp_path / "vocab.gguf", keys)) as oracle:
        assert t.eog_ids == frozenset(oracle.special()["eog"])
        for special in (True, False):
            assert [t.encode(x, False, special) for x in texts] == oracle.tokenize_all(texts, False, special)
        assert [t.token_bytes(i) for i in range(len(tokens), t.vocab_size)] == oracle.pieces()[len(tokens) :]


def test_ends_of_generation():
    tokens, merges = pair_vocabulary()
    t = Tokenizer.from_metadata(metadata("gpt2", tokens + NAMES[:2], pre="qwen2", merges=merges, eos_token_id=5))
    assert t.eog_ids == {5, len(tokens), len(tokens) + 1}
    assert t.is_special(len(tokens))
    assert not t.is_special(0)


STRIPPED = [
    ({"general.name": "Phi-3 mini"}, ["<s>", "</s>", "<unk>", "<|endoftext|>", "<|user|>", "<|end|>"]),
    ({"general.architecture": "nomic-bert-moe"}, ["<mask>", "<s>"]),
    ({"general.name": "modern-bert base"}, ["[MASK]", "<s>"]),
]


@pytest.mark.parametrize(("general", "names"), STRIPPED)
def test_tokens_that_swallow_spaces(general, names, tmp_path):
    tokens, merges = pair_vocabulary()
    types = [NORMAL] * len(tokens) + [CONTROL] * (len(names) - 1) + [USER_DEFINED]
    keys = {**general, **metadata("gpt2", tokens + names, types=types, pre="gpt-2", merges=merges)}
    t = Tokenizer.from_metadata(keys)
    texts = [f"a {x} \n{y}\t {x}  b" for x in names for y in names]
    with LlamaCpp(write_gguf(tmp_path / "vocab.gguf", keys)) as oracle:
        assert [t.encode(x) for x in texts] == oracle.tokenize_all(texts)


def slow_split(tokens: list[SpecialToken], text: str) -> list[str | int]:
    """The rule, word by word: for each token, longest first, cut every piece of text at it."""
    pieces: list[str | int] = [text]
    for token in sorted(tokens, key=lambda t: -len(t.text.encode())):
        out: list[str | int] = []
        for piece in pieces:
            rest = piece
            while isinstance(rest, str) and token.text in rest:
                before, _, rest = rest.partition(token.text)
                out += [before, token.id]
            out.append(rest)
        pieces = out
    return [piece for piece in pieces if piece != ""]


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.lists(st.text("ab<", min_size=1, max_size=4), unique=True, max_size=8), st.text("ab<c", max_size=30))
def test_matcher_is_the_rule(texts, text):
    tokens = [SpecialToken(i, t, control=False, lstrip=False, rstrip=False) for i, t in enumerate(texts)]
    assert SpecialMatcher(tokens).split(text, parse_special=False) == slow_split(tokens, text)


def test_control_tokens_are_text_unless_parsed():
    matcher = SpecialMatcher([SpecialToken(1, "<s>", True, False, False), SpecialToken(2, "<u>", False, False, False)])
    assert matcher.split("a<s><u>", parse_special=False) == ["a<s>", 2]
    assert matcher.split("a<s><u>", parse_special=True) == ["a", 1, 2]


def test_import_needs_no_jax():
    code = "import sys, oxjax.tokenizer; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
