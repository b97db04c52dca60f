"""The law: what a request gives depends on model, prompt, parameters and seed alone. To the bit, in exact mode."""

import dataclasses

import numpy as np
import pytest

import oxjax
from oxjax import SamplingParams
from oxjax.engine.engine import Engine

QUICK = ["llama", "gemma3"]  # both pairings, windows, QK-norms, post-norms and two rotations
OTHERS = ["llama_yarn", "qwen2", "qwen3", "gemma", "gemma2", "phi3"]
PARAMS = SamplingParams(max_tokens=12, temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, seed=11, logprobs=3)


def prompts(n, length, vocab=512, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, length + 7 * i).tolist() for i in range(n)]


class Harness:
    """One model under engines of different shapes."""

    def __init__(self, path, *, exact=True):
        self.model = oxjax.load(path, exact=exact)

    def engine(self, *, max_rows=64, max_batch=8, max_context=192, page_size=16):
        pages = 1 + max_batch * -(-max_context // page_size)
        return Engine(
            self.model,
            n_pages=pages,
            page_size=page_size,
            max_batch=max_batch,
            max_rows=max_rows,
            max_context=max_context,
        )

    def run(self, ids, *, neighbours=(), params=PARAMS, **shape):
        """Logits at every prompt position, and what the prompt generates, with others in the batch."""
        engine = self.engine(**shape)
        others = [engine.generate(p, dataclasses.replace(params, seed=i), i) for i, p in enumerate(neighbours)]
        scored, generated = engine.logits(ids), engine.generate(ids, params, params.seed)
        while not all(r.done for r in [scored, generated, *others]):
            engine.step()
        assert engine.scheduler.allocator.used_count == 0
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


def test_the_order_of_a_batch_does_not_matter(data):
    with oxjax.LLM(data / "archs" / "gemma3.gguf", max_batch=4) as llm:
        texts = prompts(9, 5)
        params = [dataclasses.replace(PARAMS, seed=i) for i in range(9)]
        forward = llm.generate(texts, params)
        backward = llm.generate(texts[::-1], params[::-1])
    assert forward == backward[::-1]


def test_fast_mode_agrees_up_to_rounding(data):
    ids = prompts(1, 90)[0]
    harness = Harness(data / "archs" / "qwen3.gguf", exact=False)
    exact = Harness(data / "archs" / "qwen3.gguf").run(ids)[0]
    greedy = dataclasses.replace(PARAMS, temperature=0.0)
    for shape in VARIANTS.values():
        logits = harness.run(ids, params=greedy, **shape)[0]
        # Float32 rounding through three layers, as a share of the logits' spread; measured about 2e-6.
        assert np.abs(logits - exact).max() / exact.std() < 2e-5
