"""Beam search against transformers and against its definition; what ends it, what it shares, and `best_of`."""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from oxjax import LLM, BeamParams, Grammar, SamplingParams
from oxjax.errors import (
    GrammarError,
    GrammarStuckError,
    InvalidRequestError,
    NonFiniteLogitsError,
    NothingLeftError,
    RequestTooLargeError,
)
from oxjax.sampling.params import sample_seed
from tests.helpers.beam_model import BEGIN, END, TOKENS, log_softmax, naive_search, write_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
PROMPTS = [[BEGIN, *np.random.default_rng(i).integers(3, len(TOKENS), 3 + 4 * i).tolist()] for i in range(4)]
A = TOKENS.index("a")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("beams") / "tiny.gguf")


@pytest.fixture(scope="module")
def llm(path):
    with LLM(path, dtype="float32", max_batch=5, max_context=64) as llm:
        yield llm


def search(llm, prompt, params=GREEDY, **beams):
    return llm.beam_search([prompt], BeamParams(**beams), params)[0]


def agree(results, expected):
    """The same texts in the same order, with the same scores up to rounding."""
    assert [r.token_ids for r in results] == [tokens for _, tokens in expected]
    np.testing.assert_allclose([r.score for r in results], [score for score, _ in expected], rtol=1e-4, atol=1e-5)


PEER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, logging
logging.set_verbosity_error()
torch.set_num_threads(1)
folder, name, prompts, cases, n_new = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
for prompt in prompts:
    for width, penalty, early in cases:
        scored = {} if width == 1 else {"length_penalty": penalty, "early_stopping": early or "never"}
        given = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
            num_beams=width, num_return_sequences=width, max_new_tokens=n_new, pad_token_id=0,
            return_dict_in_generate=True, output_scores=True, **scored,
        )
        texts = given.sequences[:, len(prompt):].tolist()
        print(json.dumps([texts, None if width == 1 else given.sequences_scores.tolist()]))
"""


def test_transformers(path, llm):
    """The interpreter that has it is this one, or the one that OXJAX_TRANSFORMERS_PYTHON names."""
    python = os.environ.get("OXJAX_TRANSFORMERS_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import torch, transformers"], capture_output=True, check=False).returncode:
        pytest.skip(f"{python} has no transformers (extra `bench`)")
    cases = [(1, 1.0, True), *itertools.product((2, 4, 5), (-1.0, 0.0, 1.0, 2.0), (True, False))]
    arguments = json.dumps([str(path.parent), path.name, PROMPTS, cases, GREEDY.max_tokens])
    done = subprocess.run([python, "-c", PEER, arguments], capture_output=True, text=True, check=True)
    given = iter(map(json.loads, done.stdout.splitlines()))
    n_ended = 0
    for prompt in PROMPTS:
        for width, penalty, early in cases:
            texts, scores = next(given)
            texts = [t[: t.index(END) + 1] if END in t else t for t in texts]  # padding follows
            results = search(llm, prompt, width=width, length_penalty=penalty, early_stopping=early)
            agree(results, list(zip(scores or [r.score for r in results], texts, strict=True)))
            n_ended += sum(t[-1] == END for t in texts)
    assert next(given, None) is None
    assert n_ended > 100  # of some 1000


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("width", [2, 5])
def test_the_definition(llm, width, penalty, early):
    for prompt in PROMPTS[1:2]:
        expected = naive_search(llm, prompt, GREEDY.max_tokens, width=width, penalty=penalty, early=early)
        assert len(expected) == width
        agree(search(llm, prompt, width=width, length_penalty=penalty, early_stopping=early), expected)


@pytest.mark.parametrize("width,n_groups", [(4, 2), (6, 3), (3, 3)])
@pytest.mark.parametrize("diversity", [0.0, 0.7, 5.0])
def test_diverse_groups(llm, width, n_groups, diversity):
    """Diversity decides what is chosen at a step; texts are compared by their log-probabilities alone."""
    for prompt in PROMPTS[:2]:
        how = {"width": width, "n_groups": n_groups}
        expected = naive_search(llm, prompt, 6, **how, diversity=diversity, penalty=1.0, early=False)
        params = dataclasses.replace(GREEDY, max_tokens=6)
        results = search(llm, prompt, params, **how, diversity_penalty=diversity)
        agree(results, expected)
        if diversity == 5.0:
            assert len({r.token_ids[0] for r in results}) >= n_groups


def test_biases_bans_and_penalties(llm):
    """Beams are compared by the distribution that the parameters leave."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=8,
        logit_bias={9: 2.0, END: 1.0},
        banned_tokens=(A, 11, 12),
        frequency_penalty=0.8,
        presence_penalty=0.5,
        penalty_window=6,
    )

    def change(tokens, logits):
        logits = logits.astype(np.float64)
        logits[[9, END]] += 2.0, 1.0
        logits[[A, 11, 12]] = -np.inf
        counts = np.bincount(tokens[-6:], minlength=len(logits))
        return logits - 0.8 * counts - 0.5 * (counts > 0)

    for prompt in PROMPTS:
        expected = naive_search(llm, prompt, 8, width=4, penalty=1.0, early=False, change=change)
        agree(search(llm, prompt, params, width=4), expected)


def test_dry_and_beams(llm):
    """Tokens that would repeat two others are not chosen by any beam, where they were before."""
    bias = dict.fromkeys(range(A, A + 3), 6.0)
    params = SamplingParams(temperature=0.0, max_tokens=12, logit_bias=bias, banned_tokens=(END,))
    dry = dataclasses.replace(params, dry_multiplier=1e5, dry_breakers=())

    def repeats(result):
        tokens = PROMPTS[0] + result.token_ids
        triples = [tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)]
        return len(set(triples)) < len(triples)

    assert any(map(repeats, search(llm, PROMPTS[0], params)))
    assert not any(map(repeats, search(llm, PROMPTS[0], dry)))


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
def test_a_width_of_one_is_greedy(llm, penalty):
    late = dataclasses.replace(GREEDY, min_tokens=3, stop="e", logprobs_of="sampling")
    for prompt, params in itertools.product(PROMPTS, (GREEDY, late)):
        (result,) = search(llm, prompt, params, width=1, length_penalty=penalty)
        (greedy,) = llm.generate([prompt], dataclasses.replace(params, seed=0))
        assert math.isclose(result.score, sum(greedy.logprobs) / len(greedy.logprobs) ** penalty)
        assert dataclasses.replace(result, score=None) == greedy


@pytest.mark.parametrize("penalty", [-1.0, 1.0])
def test_a_width_that_holds_all_texts_finds_the_best(llm, penalty):
    tokens = (END, A, A + 1, A + 2)
    banned = tuple(set(range(len(TOKENS))) - set(tokens))
    params = dataclasses.replace(GREEDY, banned_tokens=banned, max_tokens=3)
    texts = [[*head, last] for n in range(3) for head in itertools.product(tokens[1:], repeat=n) for last in tokens]
    texts = [t for t in texts if t[-1] == END or len(t) == 3]

    def score(text):
        rows = llm.logits([PROMPTS[1] + text])[0][len(PROMPTS[1]) - 1 :]
        rows = [np.where(np.isin(np.arange(len(row)), tokens), row, -np.inf) for row in rows]
        return sum(log_softmax(r)[t] for r, t in zip(rows, text, strict=False)) / len(text) ** penalty

    expected = sorted(((score(t), t) for t in texts), key=lambda text: -text[0])
    results = search(llm, PROMPTS[1], params, width=64, length_penalty=penalty)
    assert len(results) == len(texts) == 40
    agree(results, expected)


def test_results_are_sorted_and_whole(llm):
    for prompt in PROMPTS:
        results = search(llm, prompt, width=5, length_penalty=0.5)
        assert [r.score for r in results] == sorted((r.score for r in results), reverse=True)
        assert len({tuple(r.token_ids) for r in results}) == len(results) == 5
        for r in results:
            assert r.prompt_token_ids == prompt
            assert len(r.logprobs) == len(r.token_ids)
            assert math.isclose(r.score, sum(r.logprobs) / len(r.token_ids) ** 0.5)
            assert r.finish_reason == ("stop" if r.token_ids[-1] == END else "length")


def test_several_prompts_with_parameters_of_their_own(llm):
    params = [dataclasses.replace(GREEDY, max_tokens=3 + i) for i in range(4)]
    together = llm.beam_search(PROMPTS, BeamParams(width=3), params)
    assert together == [search(llm, ids, p, width=3) for ids, p in zip(PROMPTS, params, strict=True)]


def test_ends(llm):
    letters = "".join(TOKENS[A : A + 26])
    bans = tuple(i for i, t in enumerate(TOKENS) if t not in letters or not t)  # single letters alone
    words = dataclasses.replace(GREEDY, banned_tokens=bans, max_tokens=6)
    (plain,) = search(llm, PROMPTS[0], words, width=1)
    stop = plain.text[-4:-2]
    stopped = search(llm, PROMPTS[0], dataclasses.replace(words, stop=stop), width=4)
    assert any(r.finish_reason == "stop" for r in stopped)
    for r in stopped:
        assert stop not in r.text
        assert r.stop_reason == (stop if r.finish_reason == "stop" else None)
    last = plain.token_ids[3]
    for r in search(llm, PROMPTS[0], dataclasses.replace(words, stop_token_ids=[last]), width=4):
        assert last not in r.token_ids[:-1]
        assert (r.finish_reason, r.stop_reason) == (("stop", last) if r.token_ids[-1] == last else ("length", None))
    late = dataclasses.replace(GREEDY, min_tokens=5, logit_bias={END: 3.0})
    lengths = [len(r.token_ids) for r in search(llm, PROMPTS[0], late, width=4)]
    assert min(lengths) == 6  # the first token that may end it comes after five others
    context = dataclasses.replace(GREEDY, max_tokens=None, banned_tokens=(END,))
    for r in search(llm, PROMPTS[0], context, width=2):
        assert (len(PROMPTS[0]) + len(r.token_ids), r.finish_reason) == (64, "context")


def test_grammars(llm):
    """All texts of a small language, in the order of what is left of the distribution."""
    words = ["ab", "cd", "e"]
    params = dataclasses.replace(GREEDY, grammar=Grammar.choice(words))
    results = search(llm, PROMPTS[1], params, width=6, length_penalty=0.0)
    assert sorted(r.text for r in results) == words
    assert all(r.finish_reason == "stop" and r.token_ids[-1] == END for r in results)
    # No word begins another, so the shares of the texts are all there is.
    assert math.isclose(sum(math.exp(r.score) for r in results), 1.0, rel_tol=1e-4)
    schema = {"type": "object", "properties": {"a": {"enum": [1, 22, 333]}}, "required": ["a"]}
    params = SamplingParams(temperature=0.0, max_tokens=30, grammar=Grammar.json_schema(schema))
    assert {json.loads(r.text)["a"] for r in search(llm, PROMPTS[2], params, width=5)} <= {1, 22, 333}
    numbers = dataclasses.replace(GREEDY, grammar=Grammar.regex("[0-9]{3}"))
    texts = [r.text for r in search(llm, PROMPTS[0], numbers, width=4)]
    assert len(set(texts)) == 4
    assert all(len(t) == 3 and t.isdigit() for t in texts)


def test_parameters_that_are_refused(llm):
    for wrong in (
        {"width": 0},
        {"width": 4, "n_groups": 3},
        {"n_groups": 0},
        {"length_penalty": math.nan},
        {"n_groups": 2, "diversity_penalty": -1.0},
        {"diversity_penalty": 1.0},
    ):
        with pytest.raises(InvalidRequestError):
            BeamParams(**wrong)
    for wrong in ({"temperature": 0.5}, {"n": 2}, {"best_of": 2}, {"logprobs": 1}):
        with pytest.raises(InvalidRequestError):
            search(llm, PROMPTS[0], dataclasses.replace(GREEDY, **wrong))
    with pytest.raises(RequestTooLargeError):
        search(llm, PROMPTS[0], dataclasses.replace(GREEDY, max_tokens=100))


def test_searches_that_fail(llm):
    with pytest.raises(GrammarError):  # nothing of it can be spelled
        search(llm, PROMPTS[0], dataclasses.replace(GREEDY, grammar=Grammar.regex("Z")))
    with pytest.raises(GrammarStuckError) as caught:  # its end cannot
        stuck = dataclasses.replace(GREEDY, grammar=Grammar.regex("abZ"))
        llm.beam_search(PROMPTS[:2], BeamParams(), [stuck, GREEDY])
    assert caught.value.index == 0
    assert caught.value.results[1] == search(llm, PROMPTS[1])
    with pytest.raises(NothingLeftError):
        banned = tuple(range(A, A + 26))
        search(llm, PROMPTS[0], dataclasses.replace(GREEDY, banned_tokens=banned, grammar=Grammar.regex("[a-z]")))
    assert llm.metrics().pages_used == llm.metrics().running == llm.metrics().waiting == 0


@pytest.mark.parametrize("max_batch", [1, 4])
def test_logits_that_are_not_finite(tmp_path, max_batch):
    """Of one beginning: its search fails, also while others wait for a place, and others do not."""
    path = write_model(tmp_path / "nan.gguf", nan_after=[A])
    with LLM(path, dtype="float32", max_batch=max_batch, max_context=64) as llm:
        with pytest.raises(NonFiniteLogitsError) as caught:
            params = [dataclasses.replace(GREEDY, logit_bias={A: 20.0}), dataclasses.replace(GREEDY, banned_tokens=[A])]
            llm.beam_search(PROMPTS[:2], BeamParams(width=3), params)
        assert caught.value.results[1] == search(llm, PROMPTS[1], params[1], width=3)
        assert llm.metrics().pages_used == 0
        assert llm.metrics().failed == 1


def test_cancelled_searches(llm):
    engine, before = llm.engine, llm.metrics()
    kept = engine.generate(PROMPTS[0], GREEDY, 0)
    searches = [engine.beam_search(PROMPTS[1], GREEDY, BeamParams(width=4)) for _ in range(2)]
    engine.cancel(searches[0])  # before it began
    for _ in range(3):
        engine.step()
    assert not searches[1].done
    for _ in range(2):  # the second time nothing happens
        engine.cancel(searches[1])
    while not kept.done:
        engine.step()
    assert [c.token_id for c in kept.output.chunks] == llm.generate([PROMPTS[0]], GREEDY)[0].token_ids
    after = llm.metrics()
    assert (after.cancelled - before.cancelled, after.running, after.waiting, after.pages_used) == (2, 0, 0, 0)


def test_nothing_is_computed_twice(path):
    """The prompt once, then a row per beam and step."""
    with LLM(path, dtype="float32", max_batch=5, max_context=64) as llm:
        prompt = PROMPTS[3] * 2
        results = search(llm, prompt, dataclasses.replace(GREEDY, max_tokens=20, banned_tokens=(END,)), width=5)
        metrics = llm.metrics()
        assert {len(r.token_ids) for r in results} == {20}
        assert metrics.computed_tokens == len(prompt) + 5 * 19
        assert (metrics.preemptions, metrics.cached_tokens) == (0, 0)
        assert (metrics.requests, metrics.finished) == (1, 1)
        whole, own = len(prompt) // 16, 3  # pages that all share, and those that the rest of a beam may take
        assert metrics.pages_peak <= whole + 5 * own + 1


def test_best_of(llm):
    """The samples are those of their seeds, and those are given whose tokens are the most likely on average."""
    params = SamplingParams(max_tokens=8, seed=5, n=2, best_of=6)
    (best,) = llm.generate([PROMPTS[0]], params)
    each = [
        llm.generate([PROMPTS[0]], dataclasses.replace(params, n=1, best_of=None, seed=sample_seed(5, i)))[0]
        for i in range(6)
    ]
    means = sorted((-np.mean(r.logprobs), i) for i, r in enumerate(each))
    assert [dataclasses.replace(r, others=()) for r in (best, *best.others)] == [each[i] for _, i in means[:2]]
    (alone,) = llm.generate([PROMPTS[0]], dataclasses.replace(params, n=1))
    assert alone == each[means[0][1]]
    everyone = llm.generate([PROMPTS[0]], dataclasses.replace(params, n=6))[0]
    assert [r.seed for r in everyone.others] == [each[i].seed for _, i in means[1:]]
    with pytest.raises(InvalidRequestError, match="6 samples"):
        next(llm.stream(PROMPTS[0], dataclasses.replace(params, n=1)))
    with pytest.raises(InvalidRequestError, match="best_of"):
        dataclasses.replace(params, n=7)
    chunks = list(llm.stream(PROMPTS[0], dataclasses.replace(params, n=1, best_of=1)))
    assert [c.token_id for c in chunks] == each[0].token_ids
