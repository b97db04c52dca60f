"""Compilations are bounded, counted and over after warm-up; the state is updated in place."""

import logging
import subprocess
import sys

import jax
import numpy as np
import pytest

from oxjax import LLM, SamplingParams
from oxjax.engine.programs import row_buckets
from oxjax.kernels.dot import min_rows
from oxjax.kernels.numerics import Numerics


@pytest.fixture
def compilations():
    """Programs that XLA compiles or loads while the test runs, counted by jax itself."""
    counted = []

    def listen(event: str, duration: float, **_: object) -> None:
        if "backend_compile" in event:
            counted.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield counted
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow  # by default `test_guided_law` does it, with more parameters
@pytest.mark.parametrize("exact", [True, False])
def test_nothing_compiles_after_warm_up(data, compilations, exact):
    rng = np.random.default_rng(0)
    with LLM(data / "models" / "stories260K" / "stories260K.gguf", max_batch=4, exact=exact) as llm:
        llm.warm_up(logprobs=4, logits=True, named_tokens=40, penalty_window=100)
        warm, counted = len(compilations), sum(llm.engine.runner.compilations.values())
        assert warm > 0
        requests = [rng.integers(3, 512, rng.integers(1, 300)).tolist() for _ in range(100)]
        params = [
            SamplingParams(
                max_tokens=int(rng.integers(1, 12)),
                temperature=float(rng.choice([0.0, 0.7])),
                top_k=int(rng.choice([0, 5])),
                logprobs=int(rng.choice([0, 3])),
                min_tokens=int(rng.choice([0, 1])),
                logit_bias=dict.fromkeys(rng.choice(512, rng.integers(0, 20), replace=False).tolist(), 1.5),
                banned_tokens=rng.choice(512, rng.choice([0, 3, 15]), replace=False).tolist(),
                repetition_penalty=float(rng.choice([1.0, 1.2])),
                presence_penalty=float(rng.choice([0.25, 0.5])),
                penalty_window=int(rng.choice([0, 20, 64, 100])),
                seed=i,
            )
            for i in range(100)
        ]
        for start in range(0, 100, 20):  # in waves of different sizes
            llm.generate(requests[start : start + 17], params[start : start + 17])
            for ids, p in zip(requests[start + 17 : start + 20], params[start + 17 : start + 20], strict=True):
                llm.generate(ids, p)
            llm.logits(requests[start : start + 2])
        assert len(compilations) == warm
        assert sum(llm.engine.runner.compilations.values()) == counted


def test_compilations_are_counted_and_logged_with_their_cause(data, caplog):
    jax.clear_caches()
    with LLM(data / "models" / "stories260K" / "stories260K.gguf", max_batch=2) as llm:
        with caplog.at_level(logging.INFO, "oxjax"):
            llm.generate("Once", SamplingParams(max_tokens=2, temperature=0.0))
        rows = llm.engine.runner.buckets[0]
        causes = [f"step of {rows} rows, 2 logits", "sampling of 2 rows, 0 most likely, 16 edits, 64 recent tokens"]
        causes += ["decoding of 2 rows, 0 most likely, 16 edits, 64 recent tokens"]
        assert dict(llm.engine.runner.compilations) == dict.fromkeys(causes, 1)
        assert [r.getMessage() for r in caplog.records if r.name == "oxjax"] == [f"compiled: first {c}" for c in causes]
        llm.generate("The", SamplingParams(max_tokens=2, temperature=0.0))
        assert sum(llm.engine.runner.compilations.values()) == 3


@pytest.mark.parametrize("max_rows", [1, 15, 16, 17, 256])
def test_buckets_cover_the_row_budget(max_rows):
    for numerics in (Numerics(), Numerics(exact=False), Numerics(backend="native")):
        sizes = row_buckets(max_rows, numerics)
        assert max_rows <= sizes[-1] < 2 * max(max_rows, 16)
        assert all(size % min_rows(numerics) == 0 for size in sizes)


ANALYSE = """
import sys
from functools import partial
import jax, jax.numpy as jnp
import oxjax
from oxjax.engine.decode import decode_steps
from oxjax.engine.decode import decoding_record
from oxjax.sampling.packing import SamplingBucket, n_words
model = oxjax.load(sys.argv[1], exact=sys.argv[2] == "True")
state = oxjax.init_state(model.config, n_pages=4000, page_size=16)
shapes = {"tokens": 16, "positions": 16, "cu_q_lens": 3, "kv_lens": 2, "logits_rows": 2, "block_tables": (2, 8)}
shapes |= {"read_slots": 2, "write_slots": 2}
batch = oxjax.Batch(**{name: jnp.zeros(shape, jnp.int32) for name, shape in shapes.items()})
step = jax.jit(partial(oxjax.step, config=model.config), donate_argnums=1)
decode = jax.jit(partial(decode_steps, config=model.config, n_top=0, bucket=SamplingBucket()), donate_argnums=1)
rows, ends = jnp.zeros((2, n_words(decoding_record(SamplingBucket())) + 8), jnp.int32), jnp.zeros(1, jnp.int32)
size = sum(a.nbytes for a in jax.tree.leaves(state))
for program in (step.lower(model.params, state, batch), decode.lower(model.params, state, rows, ends)):
    analysis = program.compile().memory_analysis()
    print(size / len(state), size, analysis.alias_size_in_bytes, analysis.temp_size_in_bytes)
"""


@pytest.mark.parametrize("exact", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_step_writes_its_pages_in_place(data, exact):
    """XLA's own account: outputs alias the donated state, and scratch space stays below one layer's pages.

    In a process without the type checks of tests, which jax's own bookkeeping of arguments does not pass.
    """
    model = str(data / "models" / "stories260K" / "stories260K.gguf")
    done = subprocess.run(
        [sys.executable, "-c", ANALYSE, model, str(exact)], check=True, capture_output=True, text=True
    )
    programs = [map(float, line.split()) for line in done.stdout.splitlines()]
    assert len(programs) == 2  # a step, and the loop over steps
    for layer, state, aliased, scratch in programs:
        assert aliased >= state
        assert scratch < layer
