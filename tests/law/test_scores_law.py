"""Log-probabilities of prompts: what the logits say, to the same bits in any company."""

import jax
import numpy as np
import pytest

from oxjax import LLM, SamplingParams
from oxjax.engine import programs
from oxjax.errors import InvalidRequestError, SnapshotError
from tests.helpers.law_harness import EMBEDDED, PARAMS, TOYS, Harness, load, outcome, prompts

IDS = prompts(1, 90)[0]


@pytest.fixture(scope="module", params=[EMBEDDED, TOYS[-1]])
def harness(request, data):
    return Harness(load(request.param, data))


@pytest.fixture(scope="module")
def llm():
    with LLM(max_context=256) as llm:
        yield llm


def scored(engine, ids, n_top=3, neighbours=()):
    (request,) = engine.score(ids[:1], [ids[1:]], n_top)
    engine.run([request, *neighbours])
    return np.concatenate(request.rows)


def test_any_company_gives_the_same_bits(harness):
    alone = scored(harness.engine(max_rows=256, max_batch=1), IDS)
    assert len(alone) == len(IDS) - 1
    for shape in ({"max_rows": 16}, {"max_rows": 7, "max_batch": 2}, {"n_pages": 14, "reuse_prefixes": True}):
        engine = harness.engine(**shape)
        others = [engine.generate(p, PARAMS, i) for i, p in enumerate(prompts(2, 40, seed=1))]
        others += [engine.logits(prompts(1, 30, seed=2)[0]), engine.hidden(prompts(1, 25, seed=3)[0])]
        others += engine.score([5, 6], [prompts(1, 20, seed=4)[0]], 20)
        for _ in range(3):
            engine.step()
        again = scored(engine, IDS, neighbours=others)
        assert again.tobytes() == alone.tobytes()
        # Those beside it notice nothing either.
        assert [c.token_id for c in others[0].output.chunks] == [
            token for token, *_ in harness.generated_alone(prompts(2, 40, seed=1)[0], PARAMS, 0)
        ]


CONTEXT = prompts(1, 37, seed=7)[0]
CONTINUATIONS = [prompts(1, n, seed=n)[0] for n in (1, 1, 2, 5, 30)]


def group(engine, neighbours=()):
    requests = engine.score(CONTEXT, CONTINUATIONS)
    engine.run([*requests, *neighbours])
    assert not engine.scheduler.running and not engine.scheduler.n_waiting
    return [np.concatenate(r.rows).tobytes() for r in requests]


@pytest.fixture(scope="module")
def scored_alone(harness):
    engine = harness.engine(max_rows=256, max_batch=1)
    return [scored(engine, CONTEXT + c, 0)[len(CONTEXT) - 1 :].tobytes() for c in CONTINUATIONS]


@pytest.mark.parametrize(
    "shape",
    [
        {"max_rows": 256, "max_batch": 8},
        {"max_rows": 16, "max_batch": 8},
        {"max_rows": 5, "max_batch": 1},
        {"max_rows": 64, "max_batch": 2, "swap": False},
        {"max_rows": 64, "max_batch": 5, "n_pages": 14, "reuse_prefixes": True},
        {"max_rows": 20, "max_batch": 4, "n_pages": 14, "swap": False},
    ],
    ids=str,
)
def test_continuations_that_share_a_context_give_the_bits_of_each_alone(harness, scored_alone, shape):
    engine = harness.engine(**shape)
    assert group(engine) == scored_alone
    others = [engine.generate(p, PARAMS, i) for i, p in enumerate(prompts(2, 40, seed=1))]
    others += engine.score(CONTEXT[:20], [prompts(1, 20, seed=4)[0], [5]], 20)
    for _ in range(2):
        engine.step()
    assert group(engine, others) == scored_alone
    assert outcome(others[0]) == harness.generated_alone(prompts(2, 40, seed=1)[0], PARAMS, 0)


def test_the_others_go_on_when_one_is_cancelled(harness, scored_alone):
    for n_steps in range(4):
        for gone in range(len(CONTINUATIONS)):
            engine = harness.engine(max_rows=20, max_batch=4)
            requests = engine.score(CONTEXT, CONTINUATIONS)
            for _ in range(n_steps):
                engine.step()
            engine.cancel(requests[gone])
            engine.run(requests)
            for i, request in enumerate(requests):
                if i != gone:
                    assert np.concatenate(request.rows).tobytes() == scored_alone[i]


@pytest.mark.parametrize("n", [1, 2, programs.SCORED_ROWS - 1, programs.SCORED_ROWS, programs.SCORED_ROWS + 1, 130])
def test_they_are_what_the_logits_say(llm, n):
    ids = prompts(1, n, seed=6)[0]
    params = SamplingParams(max_tokens=1, prompt_logprobs=4, seed=0)
    result = llm.generate(ids, params)[0]
    expected = np.asarray(jax.nn.log_softmax(llm.logits(ids)[0]))
    assert result.prompt_logprobs[0] is None and len(result.prompt_logprobs) == n
    for row, token, score in zip(expected, ids[1:], result.prompt_logprobs[1:], strict=False):
        assert score.token_id == token and score.top_logprobs[0] == (token, score.logprob)
        # One float32 reduction over the vocabulary on either side.
        assert score.logprob == pytest.approx(row[token], abs=2e-5)
        first = np.arange(len(row)) < token
        assert score.rank == 1 + (row > row[token]).sum() + ((row == row[token]) & first).sum()
        most = np.argsort(-row, kind="stable")[:4]
        assert {t for t, _ in score.top_logprobs} == {token, *most.tolist()}


def test_the_prompt_is_computed_once(llm):
    ids = prompts(1, 200, seed=9)[0]
    before = llm.metrics()
    result = llm.generate(ids, SamplingParams(max_tokens=3, n=2, prompt_logprobs=0, seed=1))[0]
    after = llm.metrics()
    assert after.computed_tokens - before.computed_tokens < 200 + 2 * 3 + 16  # at most a page of it twice
    assert len(result.prompt_logprobs) == 200
    plain = llm.generate(ids, SamplingParams(max_tokens=3, n=2, seed=1))[0]
    assert plain.prompt_logprobs is None and plain.token_ids == result.token_ids


def test_where_they_have_no_place(llm):
    with pytest.raises(InvalidRequestError, match="stream"):
        llm.stream("One", SamplingParams(prompt_logprobs=1))
    llm.engine.score([5, 6], [[7]])
    with pytest.raises(SnapshotError, match="scores"):
        llm.engine.snapshot()
    while llm.metrics().running or llm.metrics().waiting:
        llm.engine.step()
