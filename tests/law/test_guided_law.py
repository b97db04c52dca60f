"""The law for requests in whose every token the host has a say, for their neighbours, and for beam search."""

import dataclasses
import itertools
import json
import random

import pytest

from oxjax import BeamParams, Grammar, SamplingParams
from oxjax.sampling.params import STAGES, sample_seed
from tests.helpers.law_harness import EMBEDDED, PARAMS, Harness, load, outcome, prompts

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["cat", "dog", "catfish"]},
        "ages": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    },
    "required": ["name", "kind", "ages"],
    "additionalProperties": False,
}
JSON = Grammar.json_schema(SCHEMA)
OTHERS = [
    Grammar.regex("([a-z]{2,6} ){3,8}"),
    Grammar.gbnf('root ::= (word " ")* word "."\nword ::= "the" | "an" | [b-d]+ | "o" [k-p]*'),
    Grammar.choice(["once upon a time", "once more", "never again, she said"]),
    JSON,
]
FREE = dataclasses.replace(
    PARAMS, banned_tokens=(), stop_token_ids=(), logit_bias=(), min_tokens=0, max_tokens=40, top_n_sigma=0.0
)
GUIDED = dataclasses.replace(
    FREE,
    grammar=JSON,
    ignore_eos=False,
    mirostat=2,
    mirostat_tau=6.0,
    dry_multiplier=0.8,
    dry_allowed_length=1,
    dry_breakers=(",",),
    logprobs_of="sampling",
)
BEAM = SamplingParams(temperature=0.0, max_tokens=14)
WIDE = BeamParams(width=6, length_penalty=0.6)
IDS = prompts(1, 40)[0]

HYBRID = "toy hybrid"


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


for_both = pytest.mark.parametrize("harness", [slow(EMBEDDED), HYBRID], indirect=True)


@pytest.fixture(scope="module")
def harnesses(data):
    return {name: Harness(load(name, data)) for name in (EMBEDDED, HYBRID)}


@pytest.fixture
def harness(harnesses, request):
    return harnesses[request.param]


@pytest.fixture(scope="module")
def alone(harnesses):
    """What a request or a search gives on an engine of its own; computed once."""
    known = {}

    def get(harness, ids=IDS, params=GUIDED, seed=11, beams=None):
        key = id(harness), tuple(ids), params, seed, beams
        if key not in known and beams is None:
            known[key] = harness.generated_alone(ids, params, seed)
        elif key not in known:
            engine = harness.engine(max_batch=beams.width, max_rows=128)
            known[key] = searched(engine, [engine.beam_search(ids, params, beams)])[0]
        return known[key]

    return get


def whole(request):
    """All of a request's chunks: also texts, ranks, and what mirostat came to."""
    assert request.error is None
    return [dataclasses.astuple(c) for c in request.output.chunks]


def searched(engine, searches):
    """What beam searches find."""
    engine.run(searches)
    assert all(s.error is None for s in searches)
    return [[(b.score, [dataclasses.astuple(c) for c in b.output.chunks]) for b in s.found] for s in searches]


def company(engine, n=4):
    """Neighbours of every kind: with grammars, with DRY alone, free ones, and a prompt that is scored."""
    rows = []
    for i, ids in enumerate(prompts(n, 12, seed=3)):
        guided = dataclasses.replace(GUIDED, grammar=OTHERS[i % len(OTHERS)])
        free = dataclasses.replace(FREE, max_tokens=12 + i)
        dry = dataclasses.replace(free, dry_multiplier=1.0)
        rows += [(ids, params, i) for params in (guided, free, dry)[: 3 if i == 0 else 2]]
    return [(*row, engine.generate(*row)) for row in rows], engine.logits(prompts(1, 30, seed=4)[0])


SHAPES = {
    "in company": {"max_batch": 12},
    "one at a time": {"max_batch": 1, "max_rows": 1},
    "chunks of 5, three places": {"max_rows": 5, "max_batch": 3},
    "large pages, all steps in a call": {"page_size": 64, "steps_per_call": 64},
    "wide tables, prefixes": {"max_context": 512, "reuse_prefixes": True},
    "few pages": {"n_pages": 8, "max_batch": 8},
    "few pages, nothing kept": {"n_pages": 8, "max_batch": 8, "swap": False, "reuse_prefixes": True},
}


QUICK = [(EMBEDDED, "in company"), (HYBRID, "chunks of 5, three places"), (HYBRID, "few pages")]
CASES = [(name, shape) for shape in SHAPES for name in (EMBEDDED, HYBRID)]


@pytest.mark.parametrize("harness,shape", [c if c in QUICK else slow(*c) for c in CASES], indirect=["harness"])
def test_guided_rows_and_their_neighbours(harness, alone, shape):
    """Batch mates with other grammars or none, shapes, preemption; twice, so that prefixes are found."""
    engine = harness.engine(**SHAPES[shape])
    for late in (False, True):
        request = None if late else engine.generate(IDS, GUIDED, 11)
        rows, scored = company(engine, 2)
        for _ in range(5 * late):
            engine.step()
        request = engine.generate(IDS, GUIDED, 11) if late else request
        engine.run([request, scored, *(r for *_, r in rows)])
        assert outcome(request) == alone(harness)
        for *row, neighbour in rows:
            assert outcome(neighbour) == alone(harness, *row)
    if "n_pages" in SHAPES[shape] and harness.model.config.page_bytes(1):
        assert engine.metrics().preemptions > 0


def test_what_is_guided_is_what_was_asked_for(harnesses, alone):
    """The request of these tests begins a JSON object, meets DRY, and mirostat moves."""
    harness = harnesses[EMBEDDED]
    engine = harness.engine()
    request = engine.generate(IDS, dataclasses.replace(GUIDED, max_tokens=120), 11)
    engine.run([request])
    value = json.loads("".join(c.text for c in request.output.chunks))
    assert set(value) == set(SCHEMA["required"])
    assert len({c.mu for c in request.output.chunks}) > 10
    without = dataclasses.replace(GUIDED, dry_multiplier=1e-6)
    assert alone(harness, params=without) != alone(harness)


@for_both
def test_several_samples(harness, alone):
    engine = harness.engine(max_batch=3, reuse_prefixes=True)
    leader = engine.generate(IDS, dataclasses.replace(GUIDED, n=2, best_of=5), 11)
    samples = [leader, *leader.samples]
    engine.run(samples)
    assert [outcome(r) for r in samples] == [alone(harness, seed=sample_seed(11, i)) for i in range(5)]


@for_both
def test_forks_and_rewinds(harness, alone):
    """In the middle of a grammar; also into another grammar, from before the first token."""
    engine = harness.engine(max_batch=3, reuse_prefixes=True)
    request, neighbour = engine.generate(IDS, GUIDED, 11), engine.generate(IDS[:20], FREE, 3)
    while len(request.output.chunks) < 20:
        engine.step()
    n = len(request.sequence.tokens)
    twins = [engine.fork(request, length=length) for length in (n, n - 1, n - 7, len(IDS))]
    other = dataclasses.replace(GUIDED, grammar=OTHERS[0])
    elsewhere = engine.fork(request, length=len(IDS), params=other, seed=5)
    for back in (3, 11, 20):
        engine.rewind(request, len(request.sequence.tokens) - back)
        while len(request.output.chunks) < 21:
            engine.step()
    engine.run([request, neighbour, elsewhere, *twins])
    for same in (request, *twins):
        assert outcome(same) == alone(harness)
    assert outcome(elsewhere) == alone(harness, params=other, seed=5)
    assert outcome(neighbour) == alone(harness, IDS[:20], FREE, 3)
    engine.rewind(request, len(IDS) + 5)
    engine.run([request])
    assert outcome(request) == alone(harness)


@for_both
def test_cancelled_neighbours(harness, alone):
    engine, rng = harness.engine(n_pages=20, reuse_prefixes=True), random.Random(0)
    request, others, searches = engine.generate(IDS, GUIDED, 11), [], []
    while not request.done:
        ids = prompts(1, rng.randint(1, 40), seed=rng.randint(0, 5))[0]
        others.append(engine.generate(ids, dataclasses.replace(GUIDED, grammar=rng.choice([*OTHERS, None])), 3))
        searches.append(engine.beam_search(ids, BEAM, BeamParams(width=3)))
        engine.step()
        if rng.random() < 0.7:
            engine.cancel(rng.choice(others))
            engine.cancel(rng.choice(searches))
    for other in others:
        engine.cancel(other)
    for search in searches:
        engine.cancel(search)
    assert outcome(request) == alone(harness)
    assert not any(pool.used_count for pool in (engine.pool.pages, engine.pool.slots))
    assert engine.metrics().waiting == 0


@for_both
def test_snapshots(harness, alone):
    """In the middle of a grammar, with mirostat and DRY, resumed in engines of other shapes; in company."""
    engine = harness.engine(max_rows=16, max_batch=3)
    rows = [(IDS, GUIDED, 11), (IDS[:9], dataclasses.replace(GUIDED, grammar=OTHERS[0]), 2), (IDS[:20], FREE, 3)]
    requests, blobs, chunks = [engine.generate(*row) for row in rows], [], {}
    while not requests[0].done:
        blobs.append(engine.snapshot())
        engine.step()
    engine.run(requests)
    shapes = [{}, {"page_size": 64, "reuse_prefixes": True}, {"max_rows": 5, "max_batch": 1, "swap": False}]
    for request in requests:
        chunks[tuple(request.sequence.tokens[: request.n_prompt])] = whole(request)
    for i, blob in enumerate(blobs[1::25]):
        other = harness.engine(**shapes[i % 3])
        resumed = other.resume(blob)
        halfway = [other.fork(r) for r in resumed]
        other.run(resumed + halfway)
        for request in resumed + halfway:
            assert whole(request) == chunks[tuple(request.sequence.tokens[: request.n_prompt])]
    for row, request in zip(rows, requests, strict=True):
        assert outcome(request) == alone(harness, *row)


@for_both
def test_snapshots_of_forks_with_other_parameters(harness):
    """What a fork took over was reported and steered as its parent asked, not as it asks itself."""
    engine = harness.engine()
    plain = dataclasses.replace(FREE, logprobs=0, mirostat=0, mirostat_tau=5.0)
    parents = [engine.generate(IDS, GUIDED, 11), engine.generate(IDS, plain, 11)]
    while min(len(p.output.chunks) for p in parents) < 6:
        engine.step()
    forks = [engine.fork(parents[0], params=plain), engine.fork(parents[1], params=FREE), engine.fork(parents[0])]
    engine.step()
    other = harness.engine(page_size=32)
    resumed = other.resume(engine.snapshot(forks))
    engine.run(forks)
    other.run(resumed)
    assert sorted(map(whole, resumed)) == sorted(map(whole, forks))


BEAM_SHAPES = {
    "one place": {"max_batch": 1},
    "fewer places than beams": {"max_batch": 4, "max_rows": 5},
    "few pages": {"max_batch": 12, "n_pages": 14},
    "large pages": {"page_size": 64},
}
BEAM_QUICK = [(HYBRID, "one place", False), (HYBRID, "fewer places than beams", True)]
BEAM_CASES = [(*n, reuses) for n in itertools.product((EMBEDDED, HYBRID), BEAM_SHAPES) for reuses in (False, True)]


@pytest.mark.parametrize(
    "harness,shape,reuse_prefixes",
    [c if c in BEAM_QUICK else slow(*c) for c in BEAM_CASES],
    indirect=["harness"],
)
def test_beams(harness, alone, shape, reuse_prefixes):
    """Two searches at once, one with a grammar and DRY, beside requests of all kinds."""
    engine = harness.engine(**BEAM_SHAPES[shape], reuse_prefixes=reuse_prefixes)
    guided = dataclasses.replace(BEAM, grammar=JSON, dry_multiplier=0.5, frequency_penalty=0.3, max_tokens=20)
    groups = BeamParams(width=4, n_groups=2, diversity_penalty=0.5)
    wanted = [(IDS, BEAM, WIDE), (IDS[:33], guided, groups)]
    request = engine.generate(IDS, GUIDED, 11)
    searches = [engine.beam_search(*w) for w in wanted]
    found = searched(engine, searches)
    engine.run([request])
    assert found == [alone(harness, ids, params, 0, beams) for ids, params, beams in wanted]
    assert outcome(request) == alone(harness)
    assert not any(pool.used_count for pool in (engine.pool.pages, engine.pool.slots))


@for_both
def test_beams_under_pressure(harness, alone):
    """Without a place to keep state on the host, with requests that go first, in small chunks."""
    engine = harness.engine(max_batch=3, n_pages=14, swap=False, max_rows=7)
    search = engine.beam_search(IDS, BEAM, WIDE)
    rows = [(ids, dataclasses.replace(FREE, max_tokens=20), i) for i, ids in enumerate(prompts(3, 30, seed=6))]
    requests = []
    for row in rows:
        for _ in range(12):
            engine.step()
        requests.append(engine.generate(*row, priority=1))
    assert searched(engine, [search]) == [alone(harness, IDS, BEAM, 0, WIDE)]
    engine.run(requests)
    assert [outcome(r) for r in requests] == [alone(harness, *row) for row in rows]
    assert engine.metrics().preemptions > 0


def random_params(rng, n_vocab, i):
    """Any fields together that are not refused: what was warmed up for, and everything that needs no program."""

    def some(value, otherwise, share=0.4):
        return value if rng.random() < share else otherwise

    grammar = some(rng.choice(OTHERS), None)
    dry = some({"dry_multiplier": rng.uniform(0.1, 2), "dry_base": rng.uniform(1, 2)}, {})
    if dry:
        dry |= {"dry_allowed_length": rng.randint(1, 3), "dry_window": some(rng.randint(1, 50), None)}
    draws = {}
    if rng.random() < 0.75:
        draws = {
            "temperature": rng.uniform(0.2, 2),
            "temperature_range": some(0.1, 0.0),
            "typical_p": some(rng.uniform(0.5, 1), 1.0),
            "xtc_probability": some(rng.random(), 0.0),
            "mirostat": rng.choice([0, 0, 1, 2]),
            "order": rng.sample(STAGES, len(STAGES)),
        }
    penalties = {
        "repetition_penalty": rng.uniform(0.8, 1.5),
        "frequency_penalty": rng.uniform(-1, 1),
        "presence_penalty": rng.uniform(-1, 1),
    }
    penalties = {name: value for name, value in penalties.items() if rng.random() < 0.4}
    max_tokens = rng.randint(1, 8)
    return SamplingParams(
        **{"temperature": 0.0, **draws},
        grammar=grammar,
        **dry,
        max_tokens=max_tokens,
        min_tokens=0 if grammar else rng.randint(0, max_tokens),
        top_k=some(rng.randint(1, 60), 0),
        top_p=some(rng.uniform(0.3, 1), 1.0),
        min_p=some(rng.uniform(0, 0.3), 0.0),
        top_a=some(rng.random() / 2, 0.0),
        epsilon_cutoff=some(rng.random() / 10, 0.0),
        eta_cutoff=some(rng.random() / 10, 0.0),
        top_n_sigma=some(rng.uniform(0.5, 4), 0.0),
        logprobs=rng.randint(0, 8),
        logprobs_of=rng.choice(["model", "sampling"]),
        logit_bias={rng.randrange(n_vocab): rng.uniform(-3, 3) for _ in range(rng.randint(0, 20))},
        banned_tokens=[] if grammar else rng.sample(range(n_vocab), rng.randint(0, 20)),
        stop_token_ids=rng.sample(range(n_vocab), rng.randint(0, 3)),
        **penalties,
        **({"penalty_window": rng.choice([0, 1, 20, 63])} if penalties else {}),
        ignore_eos=grammar is None and rng.random() < 0.3,
        stop=some("e", ()),
        n=rng.choice([1, 1, 2]),
        best_of=some(3, None, 0.2),
        seed=i,
    )


def test_nothing_compiles_for_any_parameters(harnesses):
    """After a warm-up for 8 log-probabilities, 200 tokens by name and windows of 64.

    Other programs are compiled for more log-probabilities, longer windows, and more tokens that biases, bans, ends that
    `min_tokens` puts off and repetitions of DRY name together. Beams ask for log-probabilities of twice their width.
    """
    rng = random.Random(7)
    engine = harnesses[HYBRID].engine(max_rows=16, n_pages=30)
    engine.runner.warm_up(n_top=8, n_edits=200, n_recent=64)
    warm, used = engine.metrics().compilations, []
    for start in range(0, 200, 25):
        requests = []
        for i in range(start, start + 25):
            ids, params = [rng.randrange(3, 500) for _ in range(rng.randint(1, 40))], random_params(rng, 500, i)
            leader = engine.generate(ids, params, i)
            requests += [leader, *leader.samples]
            used.append(params)
        engine.run(requests)
        assert all(r.error is None and r.output.chunks[-1].finish_reason for r in requests)
    assert sum(p.grammar is not None for p in used) > 40
    assert sum(p.mirostat > 0 for p in used) > 40
    search = engine.beam_search(IDS, dataclasses.replace(BEAM, grammar=JSON), BeamParams(width=2))
    searched(engine, [search])
    assert engine.metrics().compilations == warm
