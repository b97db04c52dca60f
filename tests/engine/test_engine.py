"""What the engine's calls promise and refuse; that results are right is the law's business."""

import dataclasses
import logging

import jax
import numpy as np
import pytest

import oxjax
from oxjax import LLM, BeamParams, SamplingParams
from oxjax.assets import embedded_model
from oxjax.engine.config import EngineConfig
from oxjax.engine.engine import Engine
from oxjax.errors import InvalidRequestError, RequestTooLargeError, SnapshotError
from oxjax.machine import enable_compilation_cache

PARAMS = SamplingParams(max_tokens=20, temperature=0.8, ignore_eos=True)
IDS = np.random.default_rng(0).integers(300, 2000, 30).tolist()


@pytest.fixture(scope="module")
def model():
    enable_compilation_cache()
    return oxjax.load(embedded_model())


def make(model, **options):
    shape = {"n_pages": 65, "page_size": 8, "max_batch": 4, "max_rows": 32, "max_context": 128}
    return Engine(model, EngineConfig(**{"steps_per_call": 1, **shape, **options}))


@pytest.fixture
def engine(model):
    return make(model)


@pytest.fixture
def half(engine):
    request = engine.generate(IDS, PARAMS, 1)
    while len(request.output.chunks) < 10:
        engine.step()
    return request


@pytest.mark.parametrize("length", [-1, 0, 29, 41])
def test_lengths_outside_a_request_are_refused(engine, half, length):
    before = engine.snapshot()
    for call in (lambda: engine.rewind(half, length), lambda: engine.fork(half, length=length)):
        with pytest.raises(InvalidRequestError, match=f"a length of {length}, for a request with 30 .* and 40 in all"):
            call()
    assert engine.snapshot() == before


def test_what_does_not_generate_is_neither_forked_nor_rewound(engine):
    scored = engine.logits(IDS)
    with pytest.raises(InvalidRequestError):
        engine.fork(scored)
    with pytest.raises(InvalidRequestError, match="generates nothing"):
        engine.rewind(scored, 30)


def test_a_fork_that_is_done_already_or_too_long_is_refused(engine, half):
    text = "".join(c.text for c in half.output.chunks)
    requests = len(list(engine.scheduler))
    with pytest.raises(InvalidRequestError, match="done after"):
        engine.fork(half, params=dataclasses.replace(PARAMS, stop=text[:3]))
    with pytest.raises(InvalidRequestError, match="done after 10"):
        engine.fork(half, params=dataclasses.replace(PARAMS, max_tokens=10))
    with pytest.raises(RequestTooLargeError):
        engine.fork(half, params=dataclasses.replace(PARAMS, max_tokens=110))
    with pytest.raises(InvalidRequestError, match="one more each time"):
        engine.fork(half, params=dataclasses.replace(PARAMS, n=2))
    assert len(list(engine.scheduler)) == requests
    engine.run([half])


def test_forks_share_what_is_computed(engine, half):
    computed, used = engine.metrics().computed_tokens, engine.metrics().pages_used
    children = [engine.fork(half, seed=s) for s in range(3)]
    assert engine.metrics().pages_used == used
    engine.step()
    assert engine.metrics().computed_tokens - computed == 4
    engine.run([half, *children])


def test_a_rewind_to_its_own_length_changes_nothing(engine, half):
    before = engine.snapshot()
    engine.rewind(half, 40)
    assert engine.snapshot() == before


def test_a_request_that_was_done_comes_back(engine, half):
    engine.run([half])
    tokens = list(half.sequence.tokens)
    engine.rewind(half, 35)
    assert not half.done
    assert engine.metrics().waiting == 1
    engine.run([half])
    assert half.sequence.tokens == tokens


def test_a_failed_step_advances_nobody_and_can_be_run_again(model, engine, monkeypatch):
    alone = engine.generate(IDS, PARAMS, 1)
    engine.run([alone])
    request = engine.generate(IDS[::-1], PARAMS, 1)
    other = make(model)
    again = other.generate(IDS[::-1], PARAMS, 1)
    other.run([again])
    decode = engine.runner.decode

    def interrupted(*args):
        decode(*args)
        raise KeyboardInterrupt

    def fail(name, function):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(engine.runner, name, function)
            engine.step()

    fail("sample", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for i in range(12):
        engine.step()
        if i % 3 == 1:
            fail("decode", interrupted)
    engine.run([request])
    assert [(c.token_id, c.logprob) for c in request.output.chunks] == [
        (c.token_id, c.logprob) for c in again.output.chunks
    ]


def test_the_leader_of_samples_may_go_before_they_are_born(engine):
    leader = engine.generate(IDS, dataclasses.replace(PARAMS, n=4), 1)
    engine.cancel(leader.samples[0])
    engine.cancel(leader)
    engine.run([*leader.samples])
    assert [len(r.output.chunks) for r in leader.samples] == [0, 20, 20]
    metrics = engine.metrics()
    assert (metrics.finished, metrics.cancelled, metrics.pages_used) == (2, 2, 0)
    assert metrics.computed_tokens == 30 + 2 * 19


def test_samples_survive_a_snapshot_before_they_are_born(model, engine):
    leader = engine.generate(IDS, dataclasses.replace(PARAMS, n=3), 1)
    blob = engine.snapshot()
    engine.run([leader, *leader.samples])
    other = make(model)
    resumed = other.resume(blob)
    other.run([*resumed])
    assert [r.sequence.tokens for r in resumed] == [r.sequence.tokens for r in (leader, *leader.samples)]


def test_priority_goes_first_and_is_kept_by_snapshots(model):
    engine = make(model, max_batch=1)
    low = engine.generate(IDS, PARAMS, 1)
    engine.step()
    high = engine.generate(IDS[:5], PARAMS, 2, priority=2)
    engine.step()
    assert engine.scheduler.running == [high.sequence]
    other = make(model, max_batch=1)
    first, second = other.resume(engine.snapshot())
    assert (first.sequence.priority, second.sequence.priority) == (2, 0)
    engine.run([high])
    assert not low.done
    engine.run([low])


def test_a_model_that_cannot_reuse_says_so(data, caplog):
    model = oxjax.load(data / "archs" / "mamba2.gguf")
    with caplog.at_level(logging.WARNING, "oxjax"):
        engine = make(model, n_checkpoints=0)
    assert "prefixes are not reused" in caplog.text
    assert not engine.metrics().reuses_prefixes
    assert make(model, checkpoint_every=16).metrics().reuses_prefixes


def test_state_is_accounted_for(data):
    with LLM(data / "archs" / "falconh1.gguf", max_context=256) as llm:
        llm.generate([[5, 6, 7]], dataclasses.replace(PARAMS, max_tokens=3))
        metrics, state = llm.metrics(), llm.engine.runner.state
    sizes = sum(a.nbytes for a in jax.tree.leaves(state))
    assert metrics.page_bytes * (metrics.pages + 1) + metrics.slot_bytes * (metrics.slots + 1) == sizes
    assert (metrics.pages_used, metrics.slots_used) == (0, 0)


def test_the_live_line_names_what_goes_on(engine, half):
    line = engine.metrics().line(engine.metrics())
    assert "0 done, 1 running, 0 waiting" in line
    assert "prompt tokens found" in line


def test_llm_gives_all_samples():
    with LLM(max_context=128) as llm:
        result = llm.generate("Once upon a time", dataclasses.replace(PARAMS, n=3, seed=5))[0]
        assert len(result.others) == 2
        for sample in (result, *result.others):
            alone = llm.generate("Once upon a time", dataclasses.replace(PARAMS, seed=sample.seed))[0]
            assert alone.token_ids == sample.token_ids
            assert alone.logprobs == sample.logprobs
        with pytest.raises(InvalidRequestError, match="one sample"):
            llm.stream("Once", dataclasses.replace(PARAMS, n=2))


def test_requests_have_waiters(engine):
    """Whoever runs the steps, a request is handed once to the caller that waits for it; parts count for their owner."""
    first, second = (engine.generate(IDS, dataclasses.replace(PARAMS, n=n), 3) for n in (1, 3))
    told, nested = [], []

    def done(request):
        told.append(request)
        if not nested:
            nested.append(engine.generate(IDS[:5], PARAMS, 4))
            engine.run(nested)  # which may finish the second as well

    engine.run([first, second, first], done)
    assert told == [first, second] and nested[0].done and all(r.done for r in second.samples)
    engine.run([first, first], told.append)  # what is done is told at once
    assert told == [first, second, first]

    alone = engine.generate(IDS, PARAMS, 3)
    found = []
    while not found:
        found = engine.step()
    assert found == [alone] and alone.result().token_ids == first.result().token_ids

    waited = engine.generate(IDS, PARAMS, 3)
    waited.on_done = told.append
    with pytest.raises(ValueError, match="waits for this request already"):
        engine.run([waited])
    engine.cancel(waited)
    assert told[-1] is waited and not engine.active.by_sequence


def test_a_run_that_is_cut_short_leaves_nothing(engine):
    requests = [engine.generate(IDS, dataclasses.replace(PARAMS, n=2), i) for i in range(3)]
    with pytest.raises(KeyboardInterrupt):
        engine.run(requests, on_step=lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not engine.active.by_sequence and not engine.scheduler.running and not engine.scheduler.n_waiting
    assert all(part.done for r in requests for part in r.parts)


def test_a_run_that_is_cut_short_cancels_all_even_if_somebody_elses_waiter_raises(engine):
    requests = [engine.generate(IDS, dataclasses.replace(PARAMS, n=2), i) for i in range(3)]
    (sample,) = requests[0].samples
    sample.on_done = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        engine.run(requests, on_step=lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not engine.active.by_sequence and not engine.scheduler.running and not engine.scheduler.n_waiting


def test_a_beam_search_has_no_snapshot(engine):
    search = engine.beam_search(IDS, SamplingParams(max_tokens=4, temperature=0.0), BeamParams(width=2))
    with pytest.raises(SnapshotError, match="beams"):
        engine.snapshot([search])
    engine.run([search])
    assert len(search.result()) == 2
