"""The law: what a request gives depends on model, prompt, parameters and seed alone. To the bit, in exact mode."""

import dataclasses

import numpy as np
import pytest

import oxjax
from oxjax import SamplingParams
from oxjax.engine.engine import Engine
from oxjax.sampling import pipeline

QUICK = ["llama", "gemma3"]  # both pairings, windows, QK-norms, post-norms and two rotations
OTHERS = ["llama_yarn", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "cohere2", "falcon", "gpt2", "granite", "olmo2"]
PARAMS = SamplingParams(max_tokens=12, temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, seed=11, logprobs=3)


def prompts(n, length, vocab=512, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, length + 7 * i).tolist() for i in range(n)]


class Harness:
    """One model under engines of different shapes."""

    def __init__(self, path, *, exact=True):
        self.model = oxjax.load(path, exact=exact)

    def engine(self, *, max_rows=64, max_batch=8, max_context=192, page_size=16, n_pages=None, **options):
        return Engine(
            self.model,
            n_pages=1 + (max_batch * -(-max_context // page_size) if n_pages is None else n_pages),
            page_size=page_size,
            max_batch=max_batch,
            max_rows=max_rows,
            max_context=max_context,
            **{"reuse_prefixes": False, **options},
        )

    def run(self, ids, *, neighbours=(), params=PARAMS, **shape):
        """Logits at every prompt position, and what the prompt generates, with others in the batch."""
        return self.run_in(self.engine(**shape), ids, neighbours, params)

    def run_in(self, engine, ids, neighbours=(), params=PARAMS):
        """The same in an engine that may have run before."""
        others = [engine.generate(p, dataclasses.replace(params, seed=i), i) for i, p in enumerate(neighbours)]
        scored, generated = engine.logits(ids), engine.generate(ids, params, params.seed)
        while not all(r.done for r in [scored, generated, *others]):
            engine.step()
        assert engine.scheduler.running or engine.scheduler.allocator.used_count == 0
        chunks = generated.output.chunks
        return (
            np.concatenate(scored.logits),
            [c.token_id for c in chunks],
            [c.logprob for c in chunks],
            [c.top_logprobs for c in chunks],
        )


def assert_same(got, expected):
    np.testing.assert_array_equal(got[0], expected[0])
    assert got[1:] == expected[1:]


VARIANTS = {
    "batch of 9": {"neighbours": prompts(7, 20, seed=1), "max_batch": 9},
    "one token at a time": {"max_rows": 1, "max_batch": 1},
    "chunks of 5": {"max_rows": 5, "max_batch": 2},
    "chunks of 16": {"max_rows": 16, "max_batch": 2},
    "chunks of 64": {"max_rows": 64, "max_batch": 2},
    "wider tables": {"max_context": 512, "max_batch": 3},
    "other page size": {"page_size": 64, "max_batch": 2},
}


@pytest.fixture(scope="module")
def harness(data, request):
    return Harness(data / "archs" / f"{request.param}.gguf")


@pytest.mark.parametrize(
    "harness", QUICK + [pytest.param(name, marks=pytest.mark.slow) for name in OTHERS], indirect=True
)
def test_bits_are_the_same_however_it_runs(harness):
    ids = prompts(1, 90)[0]
    alone = harness.run(ids, max_rows=256, max_batch=2)
    for shape in VARIANTS.values():
        assert_same(harness.run(ids, **shape), alone)


@pytest.mark.slow
@pytest.mark.parametrize("harness", QUICK, indirect=True)
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 128, 129, 150])
def test_bits_are_the_same_at_every_boundary(harness, length):
    ids = prompts(1, length)[0]
    alone = harness.run(ids, max_rows=256, max_batch=2)
    for shape in VARIANTS.values():
        assert_same(harness.run(ids, **shape), alone)


@pytest.fixture(scope="module")
def alone(harness):
    return {n: harness.run(prompts(1, n)[0], max_rows=256, max_batch=2) for n in (90, 63, 64, 65)}


@pytest.mark.parametrize(
    "harness", ["gemma3"] + [pytest.param(name, marks=pytest.mark.slow) for name in ("llama", *OTHERS)], indirect=True
)
class TestPages:
    """Bits are those of the request alone whether its past was computed, found, or computed again."""

    @pytest.mark.parametrize("cached", [15, 16, 17, 63, 64, 65, 90])
    def test_a_prefix_that_is_found(self, harness, alone, cached):
        """After a prompt that shares the first `cached` tokens, and after the very same prompt, twice."""
        engine = harness.engine(reuse_prefixes=True, max_batch=4)
        ids = prompts(1, 90)[0]
        harness.run_in(engine, ids[:cached] + prompts(1, 20, seed=5)[0])
        before = engine.metrics().cached_tokens
        for _ in range(3):
            assert_same(harness.run_in(engine, ids), alone[90])
        # The generating request of each run finds what came before: once the shared pages, then all but the last.
        assert engine.metrics().cached_tokens - before >= cached // 16 * 16 + 2 * 80

    @pytest.mark.parametrize("length", [63, 64, 65])
    def test_a_prompt_that_is_cached_whole(self, harness, alone, length):
        engine = harness.engine(reuse_prefixes=True, max_batch=4)
        for _ in range(2):
            assert_same(harness.run_in(engine, prompts(1, length)[0]), alone[length])

    @pytest.mark.parametrize("swap", [False, True], ids=["recomputed", "swapped"])
    @pytest.mark.parametrize("reuse_prefixes", [False, True], ids=["alone", "with prefixes"])
    def test_preemption(self, harness, alone, reuse_prefixes, swap):
        """Neighbours that grow take the pages of younger ones; everybody ends as if alone."""
        engine = harness.engine(n_pages=14, max_batch=4, reuse_prefixes=reuse_prefixes, swap=swap)
        neighbours = prompts(3, 40, seed=1)
        long = dataclasses.replace(PARAMS, max_tokens=60)
        others = [engine.generate(p, long, 11) for p in neighbours]
        assert_same(harness.run_in(engine, prompts(1, 90)[0]), alone[90])
        while not all(r.done for r in others):
            engine.step()
        assert engine.metrics().preemptions > 0
        for request, ids in zip(others, neighbours, strict=True):
            expected = harness.run(ids, max_batch=2, params=long)
            assert [c.token_id for c in request.output.chunks] == expected[1]
            assert [c.logprob for c in request.output.chunks] == expected[2]


class TestTheHarnessCanFail:
    """Broken on purpose, each of these must make the comparison fail."""

    @pytest.fixture
    def setting(self, data):
        harness = Harness(data / "archs" / "llama.gguf")
        return harness, prompts(1, 90)[0], harness.run(prompts(1, 90)[0], max_batch=2)

    def test_a_key_that_depends_on_the_batch(self, setting, monkeypatch):
        harness, ids, alone = setting
        draw = pipeline._gumbel_row
        calls = iter(range(10**6))
        monkeypatch.setattr(pipeline, "_gumbel_row", lambda seed, position, n: draw(seed, position + next(calls), n))
        assert harness.run(ids, max_batch=3)[1] != alone[1] or harness.run(ids, max_batch=5)[1] != alone[1]

    def test_a_prefix_key_that_forgets_the_tokens(self, setting, monkeypatch):
        harness, ids, alone = setting

        def by_place(tokens, i, trail):
            trail.keys[:] = [str(n).encode() for n in range(i + 1)]
            return trail.keys[i]

        engine = harness.engine(reuse_prefixes=True, max_batch=4)
        monkeypatch.setattr(engine.scheduler.prefix, "_key", by_place)
        harness.run_in(engine, prompts(1, 90, seed=5)[0])
        assert harness.run_in(engine, ids)[1:] != alone[1:]

    def test_a_page_that_two_sequences_write(self, setting, monkeypatch):
        harness, ids, alone = setting
        engine = harness.engine(max_batch=4)
        monkeypatch.setattr(engine.scheduler.allocator, "allocate", lambda n: list(range(1, n + 1)))
        monkeypatch.setattr(engine.scheduler.allocator, "free", lambda pages: None)
        with pytest.raises(AssertionError):
            assert_same(harness.run_in(engine, ids, prompts(2, 50, seed=2)), alone)


def test_the_order_of_a_batch_does_not_matter(data):
    with oxjax.LLM(data / "archs" / "gemma3.gguf", max_batch=4) as llm:
        texts = prompts(9, 5)
        params = [dataclasses.replace(PARAMS, seed=i) for i in range(9)]
        forward = llm.generate(texts, params)
        backward = llm.generate(texts[::-1], params[::-1])
    assert forward == backward[::-1]


@pytest.mark.parametrize("exact,max_batch", [(True, 16), (False, 8)], ids=["exact", "fast"])
def test_short_prompts_join_decoding_neighbours(data, exact, max_batch):
    """Batches whose rows just fit their bucket while it has as many rows as there can be sequences."""
    harness = Harness(data / "archs" / "llama.gguf", exact=exact)
    greedy = dataclasses.replace(PARAMS, max_tokens=8, temperature=0.0, logprobs=0)
    waves = [prompts(1, n, seed=n)[0] for n in (1, 2, 3, 1, 5, 2, 4, 9, 3)]
    engine = harness.engine(max_batch=max_batch, max_context=64)
    together = []
    for ids in waves:  # one more in every step
        together.append(engine.generate(ids, greedy, 0))
        engine.step()
    while not all(r.done for r in together):
        engine.step()
    single = harness.engine(max_batch=1, max_context=64)
    for ids, got in zip(waves, together, strict=True):
        alone = single.generate(ids, greedy, 0)
        while not alone.done:
            single.step()
        expected = [c.token_id for c in alone.output.chunks]
        assert [c.token_id for c in got.output.chunks] == expected
        if exact:
            assert [c.logprob for c in got.output.chunks] == [c.logprob for c in alone.output.chunks]


def test_fast_mode_agrees_up_to_rounding(data):
    ids = prompts(1, 90)[0]
    harness = Harness(data / "archs" / "qwen3.gguf", exact=False)
    exact = Harness(data / "archs" / "qwen3.gguf").run(ids)[0]
    greedy = dataclasses.replace(PARAMS, temperature=0.0)
    for shape in VARIANTS.values():
        logits = harness.run(ids, params=greedy, **shape)[0]
        # Float32 rounding through three layers, as a share of the logits' spread; measured about 2e-6.
        assert np.abs(logits - exact).max() / exact.std() < 2e-5
