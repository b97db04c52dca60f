"""The law for what callers do to requests: forks, samples, rewinds, cancellation and snapshots."""

import dataclasses
import random
import subprocess
import sys
from pathlib import Path

import pytest

from oxjax.sampling.params import sample_seed
from tests.helpers.law_cases import FREE, IDS, LONG, SMALLEST, for_all, held_for
from tests.helpers.law_harness import EMBEDDED, PARAMS, STORIES, outcome, prompts


@for_all
@pytest.mark.parametrize("reuse_prefixes", [False, True], ids=["alone", "with prefixes"])
def test_forks(harness, reuse_prefixes):
    """A fork with its own seed gives what the shared tokens alone would as a prompt; its parent notices nothing."""
    engine = harness.engine(reuse_prefixes=reuse_prefixes)
    parent = engine.generate(IDS, FREE, 11)
    while len(parent.output.chunks) < 23:
        engine.step()
    n = len(parent.sequence.tokens)
    lengths = [n, 90, 96, 97, n - 1]
    children = [engine.fork(parent, length=length, seed=40 + i) for i, length in enumerate(lengths)]
    twin = engine.fork(parent)
    engine.run([parent, twin, *children])
    late = engine.fork(parent, length=100, seed=77)
    engine.run([late])
    whole = harness.generated_alone(IDS, FREE)
    assert outcome(parent) == outcome(twin) == whole
    for i, (child, length) in enumerate(zip([*children, late], [*lengths, 100], strict=True)):
        n_left = 60 - (length - 90)
        rest = dataclasses.replace(FREE, max_tokens=n_left, min_tokens=n_left)
        seed = 77 if child is late else 40 + i
        alone = harness.generated_alone(parent.sequence.tokens[:length], rest, seed)
        assert outcome(child)[length - 90 :] == alone
        assert outcome(child)[: length - 90] == whole[: length - 90]


@for_all
@pytest.mark.parametrize("n", [4, 7])
def test_samples_of_one_prompt(harness, n):
    """`n` samples are what their seeds give alone, and the prompt is computed once when they fit."""
    engine = harness.engine(reuse_prefixes=n > 4)
    leader = engine.generate(IDS, dataclasses.replace(PARAMS, n=n), 11)
    engine.run([leader, *leader.samples])
    seeds = [sample_seed(11, i) for i in range(n)]
    assert [r.seed for r in (leader, *leader.samples)] == seeds
    assert [outcome(r) for r in (leader, *leader.samples)] == [harness.generated_alone(IDS, seed=s) for s in seeds]
    if n == 4:
        new = sum(len(r.output.chunks) - 1 for r in (leader, *leader.samples))
        # Each sample computes the last token of the prompt itself.
        assert engine.metrics().computed_tokens == len(IDS) + n - 1 + new


@for_all
@pytest.mark.parametrize("reuse_prefixes", [False, True], ids=["alone", "with prefixes"])
def test_rewind_and_replay(harness, reuse_prefixes):
    """Back to any length, several times, also from the end: the same tokens come again."""
    engine = harness.engine(reuse_prefixes=reuse_prefixes)
    whole = harness.generated_alone(IDS, LONG)
    request, other = engine.generate(IDS, LONG, 11), engine.generate(IDS[:40], LONG, 11)
    for length in (100, 96, 90, 97, 91):
        while len(request.output.chunks) < 25:
            engine.step()
        engine.rewind(request, length)
        assert len(request.sequence.tokens) == length
        assert outcome(request) == whole[: length - 90]
    engine.run([request, other])
    assert outcome(request) == whole
    engine.rewind(request, 95)
    engine.run([request])
    assert outcome(request) == whole
    assert outcome(other) == harness.generated_alone(IDS[:40], LONG)


@for_all
def test_cancelled_neighbours(harness, expected):
    """Neighbours vanish at every stage: waiting, in their prompts, decoding, preempted."""
    engine, rng = harness.engine(n_pages=16, reuse_prefixes=True), random.Random(0)
    request = engine.generate(IDS, PARAMS, 11)
    others = []
    while not request.done:
        others.append(engine.generate(prompts(1, rng.randint(1, 80), seed=rng.randint(0, 5))[0], LONG, 3))
        engine.step()
        if rng.random() < 0.7:
            engine.cancel(rng.choice(others))
    for other in others:
        engine.cancel(other)
    assert outcome(request) == expected(harness)[1]
    assert not any(pool.used_count for pool in (engine.pool.pages, engine.pool.slots))


@for_all
def test_snapshots(harness, expected):
    """Taken at every fourth step, and gone on with in engines of other shapes."""
    engine = harness.engine(max_rows=16)
    scored, request = engine.logits(IDS), engine.generate(IDS, PARAMS, 11)
    blobs = []
    while not request.done:
        blobs.append(engine.snapshot([request]))
        engine.step()
    engine.run([scored])
    shapes = [{}, {"page_size": 64, "reuse_prefixes": True}, {"max_rows": 5, "max_context": 512}]
    for i, blob in enumerate(blobs[::4]):
        other = harness.engine(**shapes[i % 3])
        (resumed,) = other.resume(blob)
        other.run([resumed])
        assert outcome(resumed) == expected(harness)[1]


CHILD = """
import pickle, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
import tests.conftest
from tests.helpers.law_harness import Harness, load, outcome
engine = Harness(load(sys.argv[2], Path(sys.argv[3]))).engine(max_rows=16)
requests = engine.resume(Path(sys.argv[4]).read_bytes())
engine.run(requests)
sys.stdout.buffer.write(pickle.dumps([outcome(r) for r in requests]))
"""


# `test_snapshot` resumes the embedded model in new processes.
@pytest.mark.parametrize(
    "name", ["toy hybrid", *(pytest.param(n, marks=pytest.mark.slow) for n in (EMBEDDED, STORIES))]
)
def test_a_snapshot_in_a_new_process(harnesses, data, tmp_path, expected, name):
    import pickle

    harness = harnesses(name)
    engine = harness.engine()
    scored, request = engine.logits(IDS), engine.generate(IDS, PARAMS, 11)
    while len(request.output.chunks) < 5:
        engine.step()
    (tmp_path / "blob").write_bytes(engine.snapshot([request]))
    arguments = [str(Path(__file__).parents[2]), name, str(data), str(tmp_path / "blob")]
    child = subprocess.run([sys.executable, "-c", CHILD, *arguments], check=True, capture_output=True)
    assert pickle.loads(child.stdout) == [expected(harness)[1]]
    engine.run([scored, request])


@held_for(EMBEDDED, "toy hybrid", *SMALLEST)
def test_everything_at_once(harness):
    """Requests come, fork, go back, are cancelled, preempted and resumed elsewhere; each ends as if alone."""
    rng = random.Random(5)
    engine = harness.engine(n_pages=16, reuse_prefixes=True)
    shared, live, done = prompts(1, 40, seed=9)[0], [], []
    for i in range(120):
        choice = rng.random()
        if choice < 0.25 and len(live) < 6:
            ids = shared[: rng.randint(1, 40)] + prompts(1, rng.randint(1, 30), seed=i)[0]
            params = dataclasses.replace(PARAMS, max_tokens=rng.randint(1, 40), min_tokens=0)
            live.append(engine.generate(ids, params, i, priority=rng.choice([0, 0, 1])))
        elif choice < 0.35 and live:
            parent = rng.choice(live)
            tokens = len(parent.sequence.tokens)
            live.append(engine.fork(parent, length=rng.randint(parent.n_prompt, tokens)))
        elif choice < 0.42 and live:
            request = rng.choice(live)
            engine.rewind(request, rng.randint(request.n_prompt, len(request.sequence.tokens)))
        elif choice < 0.47 and live:
            engine.cancel(live.pop(rng.randrange(len(live))))
        elif choice < 0.5:
            blob = engine.snapshot(live)
            for request in live:
                engine.cancel(request)
            live = engine.resume(blob)
        else:
            engine.step()
        done += [r for r in live if r.done]
        live = [r for r in live if not r.done]
    engine.run(live)
    assert len(done + live) > 20
    for request in done + live:
        prompt = request.sequence.tokens[: request.n_prompt]
        assert outcome(request) == harness.generated_alone(prompt, request.params, request.seed)
