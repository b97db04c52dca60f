"""Many requests with one beginning on a pool far too small for all of them: everybody ends, right, nothing leaks."""

import os
from pathlib import Path

import numpy as np
import pytest

import oxjax
from oxjax import SamplingParams
from oxjax.engine.config import EngineConfig
from oxjax.engine.engine import Engine

PAGE = 16


def run(model, requests, *, n_pages, reuse_prefixes, max_batch=16):
    """Run the requests together, arriving a few at a time; returns what each gave, and the engine."""
    longest = max(len(ids) + p.max_tokens for ids, p in requests)
    config = EngineConfig(
        n_pages + 1, page_size=PAGE, max_batch=max_batch, max_context=longest, reuse_prefixes=reuse_prefixes
    )
    engine = Engine(model, config)
    waiting, running, memory = list(requests), [], []
    while waiting or not all(r.done for r in running):
        running += [engine.generate(ids, params, params.seed) for ids, params in waiting[:3]]
        del waiting[:3]
        engine.step()
        memory.append(resident_mib())
    return [[(c.token_id, c.logprob) for c in r.output.chunks] for r in running], engine, memory


def resident_mib():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.parametrize(
    "n_requests,n_shared,n_checked", [(60, 300, 60), pytest.param(500, 1900, 50, marks=pytest.mark.slow)]
)
def test_shared_prompt_on_a_tenth_of_the_pages(data, report, n_requests, n_shared, n_checked):
    rng = np.random.default_rng(0)
    model = oxjax.load(data / "models" / "stories260K" / "stories260K.gguf")
    system = [1, *rng.integers(3, 512, n_shared).tolist()]
    requests = []
    for seed in range(n_requests):
        params = SamplingParams(max_tokens=int(rng.integers(4, 60)), temperature=0.8, seed=seed, ignore_eos=True)
        requests.append((system + rng.integers(3, 512, rng.integers(1, 20)).tolist(), params))
    needed = sum(-(-(len(ids) + p.max_tokens) // PAGE) for ids, p in requests)
    n_pages = -(-(len(system) + 80) // PAGE) + 12  # what one needs and a little more: far below a tenth of all
    assert n_pages < needed / 10
    results, engine, memory = run(model, requests, n_pages=n_pages, reuse_prefixes=True)
    metrics = engine.metrics()
    report(
        f"{n_requests} requests needing {needed} pages ran on {n_pages}: {metrics.cached_tokens} tokens found, "
        f"{metrics.computed_tokens} computed, {metrics.preemptions} preemptions, {metrics.evictions} evictions; "
        f"resident memory {memory[len(memory) // 2]:.0f} MiB half way, {memory[-1]:.0f} at the end"
    )
    # Tokens, text and log-probabilities of the finished requests stay; no page or row of any size may.
    assert memory[-1] - memory[len(memory) // 2] < 64
    assert metrics.finished == n_requests
    assert metrics.pages_used == 0
    assert metrics.pages_cached > 0
    assert metrics.cached_tokens > n_shared * n_requests * 0.8
    assert metrics.preemptions > 0
    roomy, *_ = run(model, requests[:n_checked], n_pages=16 * (needed // n_requests + 2), reuse_prefixes=False)
    assert results[:n_checked] == roomy
