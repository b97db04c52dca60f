"""`LLM.score` and `LLM.perplexity`: what llama.cpp's logits say, split as lm-evaluation-harness splits."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oxjax import LLM
from oxjax.engine import programs
from oxjax.errors import InvalidRequestError, NonFiniteLogitsError, RequestTooLargeError
from oxjax.evaluate.pairs import encode_pair, windows
from oxjax.tokenizer import Tokenizer
from tests.helpers.extras import require
from tests.helpers.oracle import LlamaCpp

# Float32 on both sides and logits up to 30: some 20 times the rounding of such a number. Measured: 2.5e-5.
ATOL = 5e-5
PAIRS = [
    ("Once upon a time", ", there was a little girl"),
    ("Once upon a time", ","),
    ("Once upon a time", " there was a dog."),
    ("Once upon a time", ", there was a little boy"),
    ("The cat sat ", "on the mat."),
    ("", "One day"),
    ("Tom and Lily", " went to the park"),
    ("Tom", " and"),
]


@pytest.fixture(scope="module")
def stories(data):
    return data / "models" / "stories260K" / "stories260K.gguf"


@pytest.fixture(scope="module")
def llm(stories):
    with LLM(stories, max_batch=4) as llm:
        yield llm


@pytest.fixture(scope="module")
def embedded():
    with LLM(max_batch=3, max_context=256) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(stories):
    """Float64 log-probabilities of ids, `[T, vocab]`, from llama.cpp's logits."""
    with LlamaCpp(stories, vocab_only=False) as oracle:

        def logprobs(ids):
            logits = oracle.logits(ids).astype(np.float64)
            return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)

        yield logprobs


def check(score, logprobs, context, continuation):
    rows = logprobs[len(context) - 1 : len(context) - 1 + len(continuation)]
    expected = [row[token] for row, token in zip(rows, continuation, strict=True)]
    np.testing.assert_allclose(score.token_logprobs, expected, rtol=0, atol=ATOL)
    assert score.logprob == pytest.approx(sum(expected), abs=ATOL * len(expected))
    assert score.is_greedy == all(row.argmax() == token for row, token in zip(rows, continuation, strict=True))
    assert score.ranks == [1 + int((row > row[token]).sum()) for row, token in zip(rows, continuation, strict=True)]
    assert score.token_ids == list(continuation)


def test_scores_are_what_llama_cpps_logits_say(llm, reference):
    for pair, score in zip(PAIRS, llm.score(PAIRS), strict=True):
        context, continuation = encode_pair(llm.tokenizer, *pair)
        check(score, reference([*context, *continuation][:-1]), context, continuation)


def test_greedy_text_is_greedy(llm, stories):
    cases = json.loads((stories.parent / "greedy.json").read_text())
    scores = llm.score([(llm.tokenizer.encode(c["prompt"]), c["token_ids"]) for c in cases])
    assert all(s.is_greedy and set(s.ranks) == {1} for s in scores)
    for case, score in zip(cases, scores, strict=True):
        assert score.token_ids == case["token_ids"]
        np.testing.assert_allclose(score.token_logprobs, case["logprobs"], rtol=0, atol=1e-4)  # as in `test_cli`


@pytest.mark.parametrize("n_context", [1, 2, 15, 16, 17, 33])
@pytest.mark.parametrize("lengths", [(1,), (1, 1), (2, 1, 1, 3), (15, 16, 17, 33, 1, 2, 40)])
def test_groups_of_every_size(embedded, n_context, lengths):
    rng = np.random.default_rng(n_context)
    context = rng.integers(3, 500, n_context).tolist()
    pairs = [(context, rng.integers(3, 500, n).tolist()) for n in lengths]
    before = embedded.metrics().computed_tokens
    found = embedded.score(pairs)
    # The context once, and no row for the last token of anything.
    assert embedded.metrics().computed_tokens - before <= n_context + sum(lengths) - len(lengths)
    for (_, continuation), score in zip(pairs, found, strict=True):
        rows = np.asarray(jax.nn.log_softmax(embedded.logits([*context, *continuation])[0]))[n_context - 1 :]
        expected = [rows[i, token] for i, token in enumerate(continuation)]
        np.testing.assert_allclose(score.token_logprobs, expected, rtol=0, atol=2e-5)  # one more reduction
    assert [embedded.score([pair])[0] for pair in pairs] == found
    assert embedded.score(pairs[::-1])[::-1] == found


def test_groups_wait_for_places_instead_of_taking_them_from_each_other(llm):
    rng = np.random.default_rng(5)
    contexts = [rng.integers(3, 500, rng.integers(10, 60)).tolist() for _ in range(12)]
    pairs = [(c, rng.integers(3, 500, rng.integers(2, 9)).tolist()) for c in contexts for _ in range(3)]
    before = llm.metrics()
    llm.score(pairs)
    after = llm.metrics()
    assert after.preemptions == before.preemptions
    n_rows = sum(map(len, contexts)) + sum(len(continuation) - 1 for _, continuation in pairs)
    assert after.computed_tokens - before.computed_tokens <= n_rows


def test_pairs_are_split_as_the_harness_splits_them(data):
    """Against its own code, on vocabularies with and without BOS, SentencePiece and byte-level."""
    require("lm_eval", "lm-eval")
    from lm_eval.api.model import TemplateLM

    class Splitter:
        backend = "causal"

        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def tok_encode(self, text):
            return [*self.tokenizer.head_ids, *self.tokenizer.encode(text, add_special=False)]

    for name in ("llama-spm", "gpt-2", "llama-bpe", "qwen2"):
        tokenizer = Tokenizer.from_gguf(data / "vocab" / f"ggml-vocab-{name}.gguf")
        for context, continuation in PAIRS:
            if context:
                expected = TemplateLM._encode_pair(Splitter(tokenizer), context, continuation)
                assert encode_pair(tokenizer, context, continuation) == expected


def test_what_begins_texts_is_there_once(embedded):
    tokenizer = embedded.tokenizer
    bos = tokenizer.token_text(tokenizer.bos_id)
    assert tokenizer.head_ids == [tokenizer.bos_id]
    assert encode_pair(tokenizer, bos + "One", " day") == encode_pair(tokenizer, "One", " day")
    assert encode_pair(tokenizer, "", bos + "One") == encode_pair(tokenizer, "", "One")
    assert encode_pair(tokenizer, " ", "One") == encode_pair(tokenizer, "", " One")


def test_one_bad_pair_loses_nothing(embedded):
    good = embedded.score([([5, 6], [7]), ([5, 6], [8, 9])])
    n = embedded.max_context
    for bad, error in (
        (([5, 6], []), InvalidRequestError),
        (([], [5]), InvalidRequestError),
        (("One", ""), InvalidRequestError),
        (("One", [5]), InvalidRequestError),
        (("One", "\ud800"), InvalidRequestError),
        (([5, 6], [embedded.config.vocab_size]), InvalidRequestError),
        (([5, 6], [7] * n), RequestTooLargeError),
    ):
        with pytest.raises(error) as caught:
            embedded.score([([5, 6], [7]), bad, ([5, 6], [8, 9])])
        assert caught.value.index == 1
        assert caught.value.results == (good[0], None, good[1])
    assert embedded.score([]) == []
    assert len(embedded.score([([5, 6], [7] * (n - 1))])[0].ranks) == n - 1  # the last token is never read


def test_logits_that_are_not_finite_are_an_error():
    with LLM(weights="float32") as llm:
        params = llm.model.params
        llm.model = llm.model.replace(params=params.replace(embedding=params.embedding.at[9].set(jnp.nan)))
        with pytest.raises(NonFiniteLogitsError, match="position 2") as caught:
            llm.score([([5, 6], [7, 8])])  # the matrix of the logits is the same one
        assert caught.value.index == 0


@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 20))
def test_windows_score_every_token_once(n, length, stride):
    stride = min(stride, length)
    found = list(windows(n, length, stride))
    assert [i for w in found for i in range(w.first, w.end)] == list(range(1, n))
    for i, w in enumerate(found):
        assert 0 <= w.start < w.first and w.end - 1 - w.start <= length
        if i:
            assert w.end - w.first <= stride and w.first - w.start > length - stride
            assert w.end - 1 - w.start == length


@pytest.mark.parametrize(("stride", "window"), [(None, None), (7, 40), (40, 40), (5, 12)])
def test_perplexity_is_what_llama_cpps_logits_say(llm, reference, stories, stride, window):
    text = (stories.parent / "EXPECTED.txt").read_text()[:600]
    got = llm.perplexity(text, stride, window=window)
    ids = [llm.tokenizer.bos_id, *llm.tokenizer.encode(text, add_special=False)]
    length = llm.max_context if window is None else window
    logprobs = [None] * len(ids)
    for w in windows(len(ids), length, length // 2 if stride is None else stride):
        rows = reference(ids[w.start : w.end - 1])
        for i in range(w.first, w.end):
            logprobs[i] = rows[i - 1 - w.start, ids[i]]
    assert got.token_ids == ids[1:]
    np.testing.assert_allclose(got.token_logprobs, logprobs[1:], rtol=0, atol=ATOL)
    assert got.perplexity == pytest.approx(math.exp(-np.mean(logprobs[1:])), rel=1e-5)
    n_bytes = len(llm.tokenizer.decode(ids[1:]).encode()) + 1  # of the space before the text
    assert got.bits_per_byte == pytest.approx(-sum(logprobs[1:]) / math.log(2) / n_bytes, rel=1e-5)


def test_a_text_longer_than_the_context(embedded):
    ids = np.random.default_rng(0).integers(3, 500, 700).tolist()
    found = embedded.perplexity(ids, 64)
    assert found.token_ids == ids[1:]
    *_, last = windows(len(ids), embedded.max_context, 64)
    (expected,) = embedded.score([(ids[last.start : last.first], ids[last.first : last.end])])
    assert last.end == 700 and found.token_logprobs[last.first - 1 :] == expected.token_logprobs
    for bad in ({"stride": 0}, {"stride": 300}, {"window": 257}, {"window": 10, "stride": 11}):
        with pytest.raises(InvalidRequestError, match="stride <= window"):
            embedded.perplexity(ids, **bad)
    with pytest.raises(InvalidRequestError, match="two"):
        embedded.perplexity([5])


def test_memory_does_not_grow_with_the_rows(embedded):
    """Logits are there for a block of rows: a prompt's would take `rows * vocab`."""
    params, config = embedded.model.params, embedded.config

    def scratch(n_rows):
        hidden = jax.ShapeDtypeStruct((n_rows, config.d_model), jnp.float32)
        wanted = jax.ShapeDtypeStruct((n_rows,), jnp.int32)
        program = jax.jit(lambda *rows: programs.scores(params, *rows, config=config, n_top=0))
        return program.lower(hidden, wanted, jnp.int32(1)).compile().memory_analysis().temp_size_in_bytes

    block = programs.SCORED_ROWS * config.vocab_size * 4
    assert scratch(4096) < scratch(64) + block / 2 < 4 * block


def test_after_warm_up_nothing_compiles():
    rng = np.random.default_rng(0)
    with LLM(max_context=64, max_batch=3) as llm:
        llm.warm_up(prompt_logprobs=0)
        before = llm.engine.runner.compilations.copy()
        for n in (1, 2, 9, 30):
            contexts = [rng.integers(3, 500, rng.integers(1, 30)).tolist() for _ in range(n)]
            llm.score([(c, rng.integers(3, 500, rng.integers(1, 30)).tolist()) for c in contexts for _ in range(3)])
        assert llm.engine.runner.compilations == before
