"""The public surface on a real model: llama.cpp's greedy text, errors that lose nothing, streams, seeds."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oxjax import LLM, SamplingParams
from oxjax.errors import (
    CacheError,
    EngineClosedError,
    InvalidRequestError,
    NonFiniteLogitsError,
    RequestTooLargeError,
)

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, seed=0)
DRAWN = SamplingParams(max_tokens=12, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def stories(data):
    return data / "models" / "stories260K"


@pytest.fixture(scope="module")
def llm(stories):
    with LLM(stories / "stories260K.gguf", max_batch=4) as llm:
        yield llm


@pytest.fixture
def idle(llm):
    """Check that a test leaves no page behind."""
    yield
    assert llm.engine.pool.pages.used_count == 0


@pytest.mark.parametrize("exact", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_greedy_text_is_llama_cpps(stories, exact):
    cases = json.loads((stories / "greedy.json").read_text())
    params = [SamplingParams(max_tokens=len(c["token_ids"]), temperature=0.0, ignore_eos=True) for c in cases]
    with LLM(stories / "stories260K.gguf", exact=exact) as llm:
        results = llm.generate([c["prompt"] for c in cases], params)
    for result, case in zip(results, cases, strict=True):
        assert result.prompt_token_ids == case["prompt_ids"]
        assert result.token_ids == case["token_ids"]
        # llama.cpp's text is of the new ids alone, without the space that joins them to the prompt.
        assert result.text.removeprefix(" ") == case["text"]
        # Float32 logits on both sides, log-softmax over 512 tokens; measured below 1e-5.
        np.testing.assert_allclose(result.logprobs, case["logprobs"], rtol=0, atol=1e-4)


@pytest.mark.usefixtures("idle")
def test_one_result_per_prompt_in_order_whatever_their_form(llm):
    ids = llm.tokenizer.encode("The dog")
    prompts = ["Lily", ids, "The dog", np.array(ids)]
    results = llm.generate(prompts, [GREEDY, GREEDY, replace(GREEDY, max_tokens=3), GREEDY])
    assert [len(r.token_ids) for r in results] == [12, 12, 3, 12]
    assert results[1].token_ids == results[3].token_ids
    assert results[2].token_ids == results[1].token_ids[:3]
    assert llm.generate("The dog", GREEDY) == llm.generate(ids, GREEDY) == [results[1]]
    assert llm.generate(np.array(ids), GREEDY) == [results[1]]
    assert llm.generate([np.array(ids), np.array(ids[:2])], GREEDY)[0] == results[1]
    assert llm.generate([]) == []


def test_results_can_be_reproduced_from_the_seed_they_report(llm):
    first, second = llm.generate(["Once"] * 2, replace(DRAWN, seed=None))
    assert first.seed != second.seed
    assert llm.generate("Once", replace(DRAWN, seed=first.seed)) == [first]


def test_large_seeds_are_whole(llm):
    low, high = llm.generate("Once", [replace(DRAWN, seed=5)]), llm.generate("Once", [replace(DRAWN, seed=5 + 2**63)])
    assert low[0].token_ids != high[0].token_ids


def test_logprobs_put_the_chosen_token_first(llm):
    result = llm.generate("Once upon", replace(DRAWN, logprobs=3))[0]
    scores = llm.logits(result.prompt_token_ids + result.token_ids)[0]
    expected = np.asarray(jax.nn.log_softmax(jnp.asarray(scores)))
    for i, (token, top) in enumerate(zip(result.token_ids, result.top_logprobs, strict=True)):
        row = expected[len(result.prompt_token_ids) + i - 1]
        assert top[0] == (token, result.logprobs[i])
        others = sorted((t for t in np.argsort(-row, kind="stable")[:3] if t != token), key=lambda t: -row[t])
        assert [t for t, _ in top[1:]] == others
        # Two float32 log-softmaxes over 512 tokens.
        np.testing.assert_allclose([p for _, p in top], row[[t for t, _ in top]], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("idle")
def test_streams_interleave_and_equal_generate(llm):
    params = [replace(DRAWN, seed=i, max_tokens=20) for i in range(3)]
    expected = llm.generate(["Once", "The", "Lily and Tom"], params)
    streams = [llm.stream(p, q) for p, q in zip(["Once", "The", "Lily and Tom"], params, strict=True)]
    chunks = [[], [], []]
    for turn in range(20):
        for i, stream in enumerate(streams):
            chunks[i].append(next(stream))
        if turn == 7:
            assert llm.generate("Once", params[0]) == [expected[0]]
    assert [[c.token_id for c in part] for part in chunks] == [r.token_ids for r in expected]
    assert ["".join(c.text for c in part) for part in chunks] == [r.text for r in expected]
    assert [part[-1].finish_reason for part in chunks] == ["length"] * 3
    assert all(next(stream, None) is None for stream in streams)


@pytest.mark.usefixtures("idle")
def test_an_abandoned_stream_gives_its_pages_back(llm):
    stream = llm.stream("Once", GREEDY)
    next(stream)
    assert llm.engine.pool.pages.used_count > 0
    stream.close()


@pytest.mark.usefixtures("idle")
def test_stop_texts_end_the_text_even_across_tokens(llm):
    whole = llm.generate("Once upon a time", replace(GREEDY, max_tokens=60))[0].text
    stop = whole[20:27]
    params = replace(GREEDY, max_tokens=60, stop=("never there", stop))
    result = llm.generate("Once upon a time", params)[0]
    assert result.text == whole[: whole.index(stop)]
    assert result.finish_reason == "stop"
    assert "".join(c.text for c in llm.stream("Once upon a time", params)) == result.text


@pytest.mark.usefixtures("idle")
def test_text_held_back_for_a_stop_that_does_not_come_is_not_lost(llm):
    whole = llm.generate("Once upon a time", GREEDY)[0].text
    params = replace(GREEDY, stop=(whole[-3:] + "~",))
    assert llm.generate("Once upon a time", params)[0].text == whole


@pytest.mark.usefixtures("idle")
def test_stop_tokens_end_the_text_and_are_named(llm):
    whole = llm.generate("Once upon a time", GREEDY)[0]
    token = whole.token_ids[5]
    n = whole.token_ids.index(token)
    result = llm.generate("Once upon a time", replace(GREEDY, stop=("never",), stop_token_ids=(499, token)))[0]
    assert result.token_ids == whole.token_ids[: n + 1]
    assert (result.finish_reason, result.stop_reason) == ("stop", token)
    assert result.text == llm.generate("Once upon a time", replace(GREEDY, max_tokens=n))[0].text
    assert (whole.finish_reason, whole.stop_reason) == ("length", None)


def test_the_stop_text_that_came_first_is_named(llm):
    whole = llm.generate("Once upon a time", GREEDY)[0].text
    stops = "never", whole[9:12], whole[4:7]
    result = llm.generate("Once upon a time", replace(GREEDY, stop=stops))[0]
    assert (result.text, result.finish_reason, result.stop_reason) == (whole[:4], "stop", whole[4:7])


def test_least_tokens_biases_and_bans_make_another_greedy_text(llm, monkeypatch):
    """Token by token: the largest of the logits that `logits` gives, changed by hand."""
    ids = llm.tokenizer.encode("Once upon a time")
    banned = llm.generate([ids], GREEDY)[0].token_ids[1]
    monkeypatch.setattr(llm.tokenizer, "eog_ids", frozenset(range(100, 300)))
    params = replace(GREEDY, min_tokens=6, stop_token_ids=(301, 302), banned_tokens=(banned,), logit_bias={310: 3.5})
    expected = []
    while len(expected) < 12 and not (expected and (100 <= expected[-1] < 300 or expected[-1] in (301, 302))):
        row = llm.logits([ids + expected])[0][-1].copy()
        row[banned] = -np.inf
        row[310] += np.float32(3.5)
        if len(expected) < 6:
            row[[*range(100, 300), 301, 302]] = -np.inf
        expected.append(int(row.argmax()))
    assert llm.generate([ids], params)[0].token_ids == expected
    assert len(expected) >= 6


@pytest.mark.parametrize("window", [None, 5, 0])
def test_penalties_make_another_greedy_text(llm, window):
    """Token by token, as above; what they look at grows inside of a call of several steps too."""
    ids = llm.tokenizer.encode("Once upon a time, there was a time")
    params = replace(GREEDY, max_tokens=24, repetition_penalty=1.6, frequency_penalty=0.4, presence_penalty=0.25)
    tokens = list(ids)
    while len(tokens) < len(ids) + 24:
        row = llm.logits([tokens])[0][-1].copy()
        for token in set(tokens[-window:] if window else tokens if window is None else ()):
            times = (tokens if window is None else tokens[-window:]).count(token)
            row[token] = row[token] / 1.6 if row[token] > 0 else row[token] * 1.6
            row[token] -= times * 0.4 + 0.25
        tokens.append(int(row.argmax()))
    assert llm.generate([ids], replace(params, penalty_window=window))[0].token_ids == tokens[len(ids) :]


def test_a_stop_text_does_not_end_what_must_go_on(llm):
    whole = llm.generate("Once upon a time", GREEDY)[0]
    result = llm.generate("Once upon a time", replace(GREEDY, stop=whole.text[:8], min_tokens=12))[0]
    assert (result.token_ids, result.text) == (whole.token_ids, whole.text)


def test_tokens_that_are_not_there_and_bans_of_all_are_refused(llm):
    vocab = llm.config.vocab_size
    for name in ("banned_tokens", "stop_token_ids"):
        with pytest.raises(InvalidRequestError, match=f"token id {vocab} is outside"):
            llm.generate("Once", SamplingParams(**{name: (1, vocab)}))
    with pytest.raises(InvalidRequestError, match=f"token id {vocab} is outside"):
        llm.generate("Once", SamplingParams(logit_bias={vocab: 1.0}))
    with pytest.raises(InvalidRequestError, match="forbidden"):
        llm.generate("Once", SamplingParams(banned_tokens=tuple(range(vocab))))
    only = SamplingParams(banned_tokens=tuple(i for i in range(vocab) if i != 77), max_tokens=3)
    assert llm.generate("Once", only)[0].token_ids == [77] * 3


def test_end_of_generation_tokens_stop_unless_ignored(llm, monkeypatch):
    token = llm.generate("Once upon a time", GREEDY)[0].token_ids[4]
    monkeypatch.setattr(llm.tokenizer, "eog_ids", frozenset({token}))
    result = llm.generate("Once upon a time", GREEDY)[0]
    assert result.finish_reason == "stop"
    assert result.token_ids[-1] == token
    assert token not in result.token_ids[:-1]
    assert len(llm.generate("Once upon a time", replace(GREEDY, ignore_eos=True))[0].token_ids) == 12


def test_generation_without_a_limit_ends_at_the_context(stories):
    with LLM(stories / "stories260K.gguf", max_context=20) as llm:
        result = llm.generate("Once upon a time", SamplingParams(temperature=0.0, ignore_eos=True))[0]
    assert len(result.prompt_token_ids) + len(result.token_ids) == 20
    assert result.finish_reason == "context"


@pytest.mark.usefixtures("idle")
def test_a_request_that_cannot_fit_is_refused_with_the_numbers_and_the_others_go_on(llm):
    expected = llm.generate(["Once", "The"], GREEDY)
    with pytest.raises(RequestTooLargeError, match="5000 new ones make 5002, and the context holds 2048") as error:
        llm.generate(["Once", "Once", "The"], [GREEDY, replace(GREEDY, max_tokens=5000), GREEDY])
    assert error.value.index == 1
    assert error.value.results == (expected[0], None, expected[1])
    with pytest.raises(RequestTooLargeError):
        llm.stream([5] * 2048)
    with pytest.raises(RequestTooLargeError):
        llm.logits([[5] * 2049])


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("prompt,message", [([3, 512], "512 is outside"), ([-1, 3], "-1 is outside"), ([], "empty")])
def test_bad_prompts_are_named(llm, prompt, message):
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate([prompt], GREEDY)


def test_a_call_that_ends_early_leaves_nothing_queued(llm, monkeypatch):
    """One bad text is its own error; anything else ends the call, and its other requests with it."""
    for call in (lambda texts: llm.generate(texts, GREEDY), llm.logits, llm.embed):
        with pytest.raises(InvalidRequestError, match="lone surrogate") as caught:
            call(["Once", "\ud800", "One"])
        assert caught.value.index == 1 and [r is None for r in caught.value.results] == [False, True, False]
    with pytest.raises(InvalidRequestError, match="lone surrogate"):
        llm.perplexity("\ud800")
    encode = llm.tokenizer.encode

    def broken(text, **options):
        if "Broken" in text:
            raise KeyboardInterrupt
        return encode(text, **options)

    monkeypatch.setattr(llm.tokenizer, "encode", broken)
    for call in (llm.generate, llm.logits, llm.embed, lambda texts: llm.score([("Once", text) for text in texts])):
        with pytest.raises(KeyboardInterrupt):
            call(["Once", "Broken"])
        assert llm.metrics().waiting == llm.metrics().running == 0


def test_results_are_told_as_they_come(llm):
    """Each once, before the call ends, the failed ones not; on a pool that holds few at a time."""
    prompts, told, counts = ["Once", [512], "The dog", "One"] * 20, {}, []
    params = [replace(GREEDY, max_tokens=1 + i % 7) for i in range(80)]

    def tell(i, result):
        assert i not in told
        told[i] = result

    with pytest.raises(InvalidRequestError) as caught:
        llm.generate(prompts, params, on_result=tell, progress=lambda _: counts.append(len(told)))
    assert tuple(told.get(i) for i in range(80)) == caught.value.results
    assert len(told) == 60 and 0 < counts[len(counts) // 2] < 60
    scores, told = [("Once", " upon"), ("One", " day"), ("Once", " more")] * 9, {}
    assert llm.score(scores, on_result=tell) == [told[i] for i in range(27)]


def test_parameters_must_match_prompts_in_number(llm):
    with pytest.raises(InvalidRequestError, match="2 sampling parameters for 3 prompts"):
        llm.generate(["a", "b", "c"], [GREEDY, GREEDY])


def test_bad_sizes_are_named():
    with pytest.raises(InvalidRequestError, match="max_batch 0"):
        LLM(max_batch=0)


def test_a_context_beyond_the_memory_is_refused_with_the_numbers(stories):
    with (
        LLM(stories / "stories260K.gguf", max_context=10**10) as llm,
        pytest.raises(CacheError, match="lower max_context"),
    ):
        llm.generate("Once", GREEDY)


def test_non_finite_logits_fail_their_request_alone(stories):
    with LLM(stories / "stories260K.gguf") as llm:
        good = llm.generate("Once", GREEDY)[0]
        poisoned = llm.model.params.embedding.at[77].set(jnp.nan)
        llm.engine.runner.params = llm.model.params.replace(embedding=poisoned)
        with pytest.raises(NonFiniteLogitsError) as error:
            llm.generate([[1, 77, 5], "Once"], GREEDY)
        assert error.value.index == 0
        assert error.value.results == (None, good)
        assert llm.generate("Once", GREEDY) == [good]  # and the NaN that it left in freed pages harms nobody


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("part", ["run", "sample", "decode"])
def test_a_step_that_fails_can_be_done_again(llm, monkeypatch, part):
    expected = llm.generate("Once upon", GREEDY)[0]
    stream = llm.stream("Once upon", GREEDY)
    first = [next(stream)] if part == "decode" else []
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, part, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.engine.step()
    assert [chunk.token_id for chunk in (*first, *stream)] == expected.token_ids


def test_a_closed_model_says_so(stories):
    llm = LLM(stories / "stories260K.gguf")
    llm.close()
    llm.close()
    with pytest.raises(EngineClosedError):
        llm.generate("Once", GREEDY)


def test_logits_of_long_prompts_come_in_one_piece(llm):
    ids = np.random.default_rng(0).integers(3, 512, 700).tolist()  # more than one step's rows
    whole, part = llm.logits([ids, ids[:300]])
    assert whole.shape == (700, 512)
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(whole[:300], part)


def test_bfloat16_keeps_to_the_float32_answer(stories, llm):
    ids = llm.tokenizer.encode("Once upon a time, there was a little girl named Lily. She loved to play")
    with LLM(stories / "stories260K.gguf", dtype="bfloat16") as low:
        assert {a.dtype for a in jax.tree.leaves(low.engine.runner.state)} == {jnp.dtype(jnp.bfloat16)}
        got, expected = low.logits(ids)[0], llm.logits(ids)[0]
    assert got.dtype == np.float32
    # bfloat16 keeps 8 bits: each of five layers rounds by up to 2^-9 relative; measured 2e-2 of the spread.
    assert np.abs(got - expected).max() / expected.std() < 6e-2


def test_every_block_format_runs(data):
    """All the quantised twins of one random model load and give finite logits that resemble the F16 file's."""
    ids = list(range(3, 40))
    files = sorted((data / "quants").glob("llama-*.gguf"))
    logits = {}
    for file in files:
        with LLM(file, max_context=64, max_batch=1) as llm:
            logits[file.stem.removeprefix("llama-")] = llm.logits(ids)[0]
    for name in ("Q1_0", "Q2_0"):
        with LLM(data / "quants" / f"llama-pure-{name}.gguf", max_context=64, activations="float32") as llm:
            np.testing.assert_array_equal(llm.logits(ids)[0], logits[f"pure-{name}.dequantized-F32"])
    base = logits["pure-F16"]
    for name, got in logits.items():
        assert np.isfinite(got).all(), name
        similarity = np.corrcoef(got.ravel(), base.ravel())[0, 1]
        floors = {"Q8": 0.999, "Q6": 0.99, "Q5": 0.97, "Q4": 0.95}
        wanted = next((v for k, v in floors.items() if k in name), None)
        assert wanted is None or similarity > wanted, (name, similarity)
