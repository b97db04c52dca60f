"""Several decode steps in one call: whatever ends inside of one, requests give what single steps give them."""

import copy
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import oxjax
from oxjax import SamplingParams
from oxjax.assets import embedded_model
from oxjax.engine.config import EngineConfig
from oxjax.engine.decode import MAX_STEPS
from oxjax.engine.engine import Engine
from oxjax.errors import InvalidRequestError, NonFiniteLogitsError
from oxjax.machine import enable_compilation_cache
from oxjax.models.load import Model
from tests.helpers.toy import toy_model

PARAMS = SamplingParams(max_tokens=40, temperature=4.0, ignore_eos=True)
IDS = np.random.default_rng(0).integers(300, 2000, 30).tolist()


@pytest.fixture(scope="module", params=["embedded", "hybrid"])
def model(request):
    enable_compilation_cache()
    embedded = oxjax.load(embedded_model(), weights="float32")
    return embedded if request.param == "embedded" else toy_model("hybrid", embedded.tokenizer)


def make(model, steps=MAX_STEPS, checkpoint_every=128):
    """All engines have one shape, so that programs are few."""
    shape = {"n_pages": 65, "page_size": 8, "max_batch": 4, "max_rows": 32, "max_context": 128}
    engine = Engine(model, EngineConfig(**shape, checkpoint_every=checkpoint_every, steps_per_call=steps))
    engine.loop.step_seconds = 1e-6  # no first call that only measures
    return engine


def finish(engine, *requests):
    calls = 0
    while not all(r.done for r in requests):
        engine.loop.step_seconds = 1e-6  # nor short calls because the machine is slow
        engine.step()
        calls += 1
    return calls


def given(request):
    return [(c.token_id, c.logprob, c.text, c.finish_reason) for c in request.output.chunks]


def single(model, ids=IDS, params=PARAMS, seed=1):
    """What a request gives in steps of one, alone."""
    engine = make(model, steps=1)
    request = engine.generate(ids, params, seed)
    finish(engine, request)
    return given(request)


@pytest.fixture(scope="module")
def whole(model):
    return single(model)


def used(engine):
    return [pool.used_count for pool in (engine.pool.pages, engine.pool.slots)]


@pytest.mark.parametrize("n_steps", [0, -1, MAX_STEPS + 1])
def test_numbers_of_steps_that_no_call_takes_are_refused(model, n_steps):
    with pytest.raises(InvalidRequestError, match=f"steps_per_call {n_steps}: expected 1 to {MAX_STEPS}"):
        make(model, steps=n_steps)


def test_a_call_takes_many_steps(model, whole):
    engine = make(model)
    request = engine.generate(IDS, PARAMS, 1)
    assert finish(engine, request) == 2  # the prompt, all the rest
    assert given(request) == whole
    metrics = engine.metrics()
    assert (metrics.steps, metrics.generated_tokens, metrics.computed_tokens) == (40, 40, 30 + 39)


def test_how_long_steps_take_limits_a_call(model, whole):
    engine = make(model)
    request = engine.generate(IDS, PARAMS, 1)
    engine.step()
    engine.loop.step_seconds = 0.01
    engine.step()
    assert len(request.output.chunks) == 1 + 4
    engine.loop.step_seconds = 1.0
    engine.step()
    assert len(request.output.chunks) == 1 + 4 + 1
    finish(engine, request)
    assert given(request) == whole


def test_ends_of_all_kinds_inside_a_call(model, whole):
    """An end-of-generation token, a stop text, `max_tokens`, the end of the context, and nothing, side by side."""
    text = "".join(chunk[2] for chunk in whole)
    at = dataclasses.replace(PARAMS, stop=text[20:26])
    token = next(t for i, (t, *_) in enumerate(whole) if i > 9 and t not in {t for t, *_ in whole[:i]})
    named = dataclasses.replace(PARAMS, stop_token_ids=(token, whole[2][0]), min_tokens=9, banned_tokens=(whole[5][0],))
    cases = [(PARAMS, 1), (at, 1), (dataclasses.replace(PARAMS, max_tokens=7), 1), (named, 1)]
    engine = make(model)
    requests = [engine.generate(IDS, params, seed) for params, seed in cases]
    finish(engine, *requests)
    assert [given(r) for r in requests] == [single(model, IDS, params, seed) for params, seed in cases]
    assert [r.output.chunks[-1].finish_reason for r in requests[:3]] == ["length", "stop", "length"]
    assert len(requests[3].output.chunks) >= 9
    assert whole[5][0] not in [t for t, *_ in given(requests[3])]
    assert len(requests[1].output.chunks) < 40
    assert not any(used(engine))


def test_the_end_of_the_context_inside_a_call(model):
    engine, ids = make(model), (5 * IDS)[:118]
    request = engine.generate(ids, dataclasses.replace(PARAMS, max_tokens=None), 1)
    finish(engine, request)
    assert request.output.chunks[-1].finish_reason == "context"
    assert len(request.output.chunks) == 10
    assert given(request)[:-1] == single(model, ids, dataclasses.replace(PARAMS, max_tokens=10))[:-1]


def test_tokens_that_end_a_text_end_it_on_the_device(model, whole):
    """A token of the text is made one; the device takes no step after the last row's, unless the row ignores it."""
    ends = whole[10][0]
    n = next(i for i, chunk in enumerate(whole, 1) if chunk[0] == ends)
    tokenizer = copy.copy(model.tokenizer)
    tokenizer.eog_ids = frozenset([*sorted(tokenizer.eog_ids)[1:], ends])  # as many as before: the same program
    engine = make(Model(config=model.config, params=model.params, tokenizer=tokenizer))
    heeds = dataclasses.replace(PARAMS, ignore_eos=False)
    request = engine.generate(IDS, heeds, 1)
    finish(engine, request)
    assert [c.token_id for c in request.output.chunks] == [chunk[0] for chunk in whole[:n]]
    assert request.output.chunks[-1].finish_reason == "stop"
    assert engine.metrics().steps == n
    other = engine.generate(IDS, PARAMS, 1)
    both = [engine.generate(IDS, heeds, 1), other]
    finish(engine, *both)
    assert [len(r.output.chunks) for r in both] == [n, 40]
    assert [c.logprob for c in other.output.chunks] == [chunk[1] for chunk in whole]


def test_who_waits_gets_the_place_of_the_first_that_ends(model, whole):
    engine = make(model)
    short = dataclasses.replace(PARAMS, max_tokens=5)
    requests = [engine.generate(IDS, PARAMS, 1), *(engine.generate(IDS[:20], short, seed) for seed in range(4))]
    while not requests[1].done:
        engine.loop.step_seconds = 1e-6
        engine.step()
    assert len(requests[0].output.chunks) < 10
    finish(engine, *requests)
    assert given(requests[0]) == whole
    assert given(requests[-1]) == single(model, IDS[:20], short, 3)


def test_logits_that_are_not_finite_end_their_row_alone(model, whole):
    """A token's embedding is NaN: who meets it inside a call fails, beside one that goes on."""
    alone = [chunk[0] for chunk in single(model, IDS, PARAMS, 2)]
    bad = next(token for token in alone[5:] if token not in IDS and token not in [chunk[0] for chunk in whole])
    embedding = model.params.embedding.at[bad].set(jnp.nan)
    # Logits come from a matrix of their own, so that only rows that read the token see it.
    output = model.params.output or oxjax.models.layers.linear.Linear(weight=model.params.embedding.T)
    poisoned = model.params.replace(embedding=embedding, output=output)
    engine = make(Model(config=model.config, params=poisoned, tokenizer=model.tokenizer))
    good, failing = engine.generate(IDS, PARAMS, 1), engine.generate(IDS, PARAMS, 2)
    finish(engine, good, failing)
    n = alone.index(bad) + 1
    assert isinstance(failing.error, NonFiniteLogitsError) and f"position {len(IDS) + n} " in str(failing.error)
    assert [c.token_id for c in failing.output.chunks] == alone[:n]
    assert good.error is None and [c.token_id for c in good.output.chunks] == [chunk[0] for chunk in whole]
    assert not any(used(engine))


def test_forks_rewinds_and_snapshots_between_calls(model, whole):
    engine = make(model, steps=7)
    request = engine.generate(IDS, PARAMS, 1)
    while len(request.output.chunks) < 15:
        engine.step()
    twin, blob = engine.fork(request), engine.snapshot([request])
    child = engine.fork(request, length=len(IDS) + 6, seed=9)
    engine.rewind(request, len(IDS) + 3)
    other = make(model)
    (resumed,) = other.resume(blob)
    finish(engine, request, twin, child)
    finish(other, resumed)
    assert given(request) == given(twin) == given(resumed) == whole
    rest = dataclasses.replace(PARAMS, max_tokens=34)
    alone = single(model, [*IDS, *(chunk[0] for chunk in whole[:6])], rest, 9)
    assert [c[:2] for c in given(child)[6:]] == [c[:2] for c in alone]
    engine.rewind(request, len(IDS) + 3)  # from its end, which was inside a call
    finish(engine, request)
    assert given(request) == whole


def test_cancelled_between_calls(model, whole):
    engine = make(model, steps=5)
    requests = [engine.generate(IDS, PARAMS, seed) for seed in (1, 2, 3)]
    while len(requests[1].output.chunks) < 9:
        engine.step()
    engine.cancel(requests[1])
    finish(engine, requests[0], requests[2])
    assert given(requests[0]) == whole
    assert given(requests[2]) == single(model, IDS, PARAMS, 3)
    assert not any(used(engine))


def test_samples_of_one_prompt(model, whole):
    engine = make(model)
    leader = engine.generate(IDS, dataclasses.replace(PARAMS, n=3), 1)
    assert finish(engine, leader, *leader.samples) == 2
    assert given(leader) == whole
    assert [given(r) for r in leader.samples] == [single(model, IDS, PARAMS, r.seed) for r in leader.samples]


def test_pages_that_run_out(model, whole):
    """Calls get shorter before anybody gives way; who has to, comes back."""
    engine = make(model)
    taken = engine.pool.pages.allocate(64 - 16)
    requests = [engine.generate(IDS, PARAMS, seed) for seed in (1, 2, 3)]
    calls = finish(engine, *requests)
    assert given(requests[0]) == whole
    assert [given(r) for r in requests[1:]] == [single(model, IDS, PARAMS, seed) for seed in (2, 3)]
    assert engine.metrics().preemptions > 0
    assert calls > 6
    engine.pool.pages.free(taken)
    assert not any(used(engine))


def test_checkpoints_fall_on_the_ends_of_calls(model, whole):
    """What a request made is found by the next one, recurrent states included."""
    engine = make(model, checkpoint_every=16)
    request = engine.generate(IDS, PARAMS, 1)
    finish(engine, request)
    tokens = request.sequence.tokens
    again = engine.generate(tokens, PARAMS, 5)
    finish(engine, again)
    assert engine.metrics().cached_tokens == 64  # of 70
    assert given(again) == single(model, tokens, PARAMS, 5)
