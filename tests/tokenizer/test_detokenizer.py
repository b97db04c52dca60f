"""Decoding, and decoding a token at a time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oxjax.errors import TokenizerError
from oxjax.tokenizer import Tokenizer
from oxjax.tokenizer.detokenizer import clean_spaces
from tests.helpers.data import data_files
from tests.helpers.synthetic_vocab import BYTE, BYTES, CONTROL, NORMAL, UNKNOWN, load, metadata, pair_vocabulary

SPM = Tokenizer.from_metadata(
    metadata(
        "llama", ["<unk>", "<s>", "</s>", *BYTES, "▁a", "▁", "b", "▁.", "é"],
        types=[UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * 5,
    )
)  # fmt: skip
BPE = Tokenizer.from_metadata(
    metadata("gpt2", pair_vocabulary()[0], pre="gpt-2", merges=pair_vocabulary()[1], bos_token_id=0, eos_token_id=0)
)
fixed = settings(derandomize=True, deadline=None, max_examples=300)


def streamed(t: Tokenizer, ids: list[int], **options: bool) -> str:
    stream = t.detokenizer(**options)
    out = ""
    for i in ids:
        out += stream.push(i)
        assert "\ufffd" not in out or "\ufffd" in t.decode(ids, **options)
    return out + stream.flush()


@fixed
@given(st.lists(st.integers(0, SPM.vocab_size - 1), max_size=30), st.booleans(), st.booleans())
def test_stream_is_decode_for_any_ids(ids, skip_special, continues):
    options = {"skip_special": skip_special, "continues": continues}
    assert streamed(SPM, ids, **options) == SPM.decode(ids, **options)


CLEANED = [BPE.id_of(x) for x in ("Ġ", "'", "s", "r", "e", "v", "m", ".", "a", "Ġ'", "'s", "Ġ.", "ĠĠ", "re", "ve")]
assert None not in CLEANED


@fixed
@given(st.lists(st.sampled_from(CLEANED), max_size=24))
def test_stream_is_decode_where_spaces_are_cleaned(ids):
    assert streamed(BPE, ids) == BPE.decode(ids)


@fixed
@given(st.lists(st.sampled_from(CLEANED), max_size=24))
def test_streamed_text_is_never_taken_back(ids):
    stream, shown = BPE.detokenizer(), ""
    for n, i in enumerate(ids, 1):
        shown += stream.push(i)
        assert BPE.decode(ids[:n]).startswith(shown) or BPE.decode(ids).startswith(shown)
    assert BPE.decode(ids).startswith(shown)


@fixed
@given(st.text(max_size=40))
def test_round_trip_of_any_text(text):
    for t in (SPM, BPE):
        ids = t.encode(text, add_special=False, parse_special=False)
        # SentencePiece writes a space as U+2581 and cannot tell the two apart.
        assert t.decode(ids) == (clean_spaces(text) if t is BPE else text.replace("▁", " "))
        assert streamed(t, ids) == t.decode(ids)


@pytest.mark.parametrize("path", data_files("vocab/*.gguf"))
def test_stream_is_decode_on_real_vocabularies(data, path):
    t = load(path)

    @settings(derandomize=True, deadline=None, max_examples=30)
    @given(st.lists(st.integers(0, t.vocab_size - 1), max_size=30), st.text(max_size=30))
    def check(ids, text):
        assert streamed(t, ids) == t.decode(ids)
        ids = t.encode(text)
        assert streamed(t, ids) == t.decode(ids)

    check()


def test_a_character_comes_whole():
    stream = SPM.detokenizer()
    assert [stream.push(3 + b) for b in "a🦙".encode()] == ["a", "", "", "", "🦙"]
    stream.push(3 + 0xF0)
    assert stream.flush() == "\ufffd"


def test_leading_space():
    ids = [SPM.id_of("▁a"), SPM.id_of("b")]
    assert SPM.decode(ids) == "ab"
    assert SPM.decode(ids, continues=True) == " ab"
    assert SPM.decode([SPM.bos_id, *ids]) == "<s> ab"
    assert SPM.decode([SPM.bos_id, *ids], skip_special=True) == "ab"
    assert SPM.decode(SPM.encode(" x"), skip_special=True) == " x"
    assert streamed(SPM, ids, continues=True) == " ab"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a , b ! c", "a, b! c"), ("it 's they 're", "it's they're"), ("don 't we 'll", "don 't we 'll"),
        ("a ' b", "a'b"), ("a  .", "a ."), (" .", "."), ("' ' '", "'''"), ("I 'm", "I'm"), ("x 'v", "x 'v"),
    ],
)  # fmt: skip
def test_clean_spaces(text, cleaned):
    assert clean_spaces(text) == cleaned


@pytest.mark.parametrize("token", [-1, 10**9])
def test_ids_out_of_range(token):
    for call in (
        lambda: SPM.decode([token]), lambda: SPM.token_bytes(token), lambda: SPM.token_text(token),
        lambda: SPM.detokenizer().push(token), lambda: SPM.is_special(token),
    ):  # fmt: skip
        with pytest.raises(TokenizerError, match=f"found {token}; expected 0 to {SPM.vocab_size - 1}"):
            call()
