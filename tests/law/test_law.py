"""The law: what a request gives depends on model, prompt, parameters and seed alone. To the bit, in exact mode.

Each test is a row: one circumstance that must not matter, for every model of the table. A new feature adds one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oxjax import SamplingParams
from oxjax.engine.scheduler import ScheduledChunk
from oxjax.errors import OxjaxError
from oxjax.kernels import native
from oxjax.kernels.quantized import QuantizedTensor
from tests.helpers.law_cases import IDS, KINDS, LONG, for_all, for_recurrent, for_windows_too, held_for
from tests.helpers.law_harness import EMBEDDED, PARAMS, RANDOM, STORIES, Harness, load, outcome, prompts

SHAPES = {
    "batch of 9": {"neighbours": prompts(7, 20, seed=1), "max_batch": 9},
    "one token at a time": {"max_rows": 1, "max_batch": 1},
    "chunks of 5": {"max_rows": 5},
    "chunks of 16": {"max_rows": 16},
    "wider tables": {"max_context": 512},
    "other page size": {"page_size": 64},
    "all steps in one call": {"steps_per_call": 64, "neighbours": prompts(2, 20, seed=1)},
}


@for_windows_too
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(harness, expected, shape):
    """Batch mates, chunk sizes, table widths and page sizes."""
    assert harness.run(IDS, **shape) == expected(harness)


@pytest.mark.parametrize("name", [STORIES, *(pytest.param(n, marks=pytest.mark.slow) for n in (EMBEDDED, *KINDS))])
def test_shapes_on_the_xla_backend(data, name):
    """Products in row tiles."""
    harness = Harness(load(name, data, backend="xla"))
    expected = harness.alone(IDS)
    for shape in list(SHAPES.values())[:4]:
        assert harness.run(IDS, **shape) == expected


@pytest.mark.slow
@for_all
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 128, 129, 150])
def test_shapes_at_every_boundary(harness, expected, length):
    for shape in SHAPES.values():
        assert harness.run(prompts(1, length)[0], **shape) == expected(harness, length)


@held_for(RANDOM + "experts")
def test_wide_steps(harness, expected):
    """From 4,096 numbers on XLA:CPU computes some things otherwise, such as the exponentials of a router's softmax."""
    assert harness.run(IDS, neighbours=prompts(7, 120), max_batch=9, max_rows=1024) == expected(harness)


@held_for(RANDOM + "soft caps")
def test_steps_in_a_loop_and_beside_prompts(harness, monkeypatch):
    """Two programs, of which one has the sampler in it: merged with a soft cap, it would round otherwise."""
    looped = harness.generated_alone(IDS, LONG)
    monkeypatch.setattr(ScheduledChunk, "decodes", property(lambda self: False))
    assert harness.generated_alone(IDS, LONG) == looped


@for_all
def test_arrival_order(harness, expected):
    """Requests come in any order, some while others decode."""
    others = prompts(5, 8, seed=3)
    for order in (1, -1):
        engine, requests = harness.engine(), {}
        for i in list(range(6))[::order]:
            ids, seed = (IDS, PARAMS.seed) if i == 5 else (others[i], i)
            requests[i] = engine.generate(ids, PARAMS, seed)
            engine.step()
        engine.run(requests.values())
        assert outcome(requests[5]) == expected(harness)[1]
        assert outcome(requests[0]) == harness.generated_alone(others[0], seed=0)


@for_windows_too
@pytest.mark.parametrize("cached", [15, 16, 17, 63, 64, 65, 90])
def test_prefix_hits(harness, expected, cached):
    """After a prompt that shares the first `cached` tokens, and after the very same prompt, twice."""
    engine = harness.engine(reuse_prefixes=True)
    harness.run_in(engine, IDS[:cached] + prompts(1, 20, seed=5)[0])
    before = engine.metrics().cached_tokens
    for _ in range(3):
        assert harness.run_in(engine, IDS) == expected(harness)
    # The generating request of each run finds what came before: once the shared pages, then all but the last.
    assert engine.metrics().cached_tokens - before >= cached // 16 * 16 + 2 * 80


@for_all
@pytest.mark.parametrize("length", [63, 64, 65])
def test_prompts_that_are_cached_whole(harness, expected, length):
    engine = harness.engine(reuse_prefixes=True)
    for _ in range(2):
        assert harness.run_in(engine, prompts(1, length)[0]) == expected(harness, length)


@for_all
@pytest.mark.parametrize("swap", [False, True], ids=["recomputed", "swapped"])
@pytest.mark.parametrize("reuse_prefixes", [False, True], ids=["alone", "with prefixes"])
def test_preemption(harness, expected, reuse_prefixes, swap):
    """Neighbours that grow, or that have a higher priority, take the place of others; everybody ends as if alone."""
    # Without pages only the places in the batch can be too few.
    tight = {"n_pages": 14} if harness.model.config.page_bytes(1) else {"max_batch": 3}
    engine = harness.engine(**tight, reuse_prefixes=reuse_prefixes, swap=swap)
    neighbours = prompts(3, 40, seed=1)
    others = [engine.generate(p, LONG, 11) for p in neighbours]
    for _ in range(9):
        engine.step()
    urgent = engine.generate(prompts(1, 30, seed=8)[0], LONG, 11, priority=1)
    assert harness.run_in(engine, IDS) == expected(harness)
    engine.run([*others, urgent])
    assert engine.metrics().preemptions > 0
    for request, ids in zip(others, neighbours, strict=True):
        assert outcome(request) == harness.generated_alone(ids, LONG)


@for_recurrent
@pytest.mark.parametrize("reuse_prefixes", [False, True], ids=["alone", "with prefixes"])
def test_what_freed_state_holds_does_not_matter(harness, expected, reuse_prefixes):
    """NaN in every page and slot that nobody owns, and beyond the length in those that are owned."""
    engine = harness.engine(reuse_prefixes=reuse_prefixes)
    engine.runner.state = jax.tree.map(lambda a: a.at[:].set(np.nan), engine.runner.state)
    assert harness.run_in(engine, IDS) == expected(harness)
    if not reuse_prefixes:
        engine.runner.state = jax.tree.map(lambda a: a.at[:].set(np.nan), engine.runner.state)
    assert harness.run_in(engine, IDS, prompts(2, 30)) == expected(harness)


class TestTheHarnessCanFail:
    """Broken on purpose, each of these must make the comparison fail."""

    @pytest.fixture
    def setting(self, harnesses, expected):
        harness = harnesses("toy hybrid")
        return harness, expected(harness)

    @pytest.fixture
    def traced_anew(self, setting):
        """Fresh programs for a change inside of one, and after it."""
        jax.clear_caches()
        yield
        jax.clear_caches()

    @pytest.mark.slow  # compiles everything anew
    @pytest.mark.usefixtures("traced_anew")
    def test_a_key_that_depends_on_the_batch(self, setting, monkeypatch):
        from oxjax.sampling import pipeline

        harness, alone = setting
        keys, places = pipeline._keys, lambda rows: jnp.arange(len(rows.positions), dtype=jnp.int32)

        def shifted(rows, stream):
            return keys(rows.replace(positions=rows.positions + places(rows)), stream)

        monkeypatch.setattr(pipeline, "_keys", shifted)
        assert [harness.run(IDS, **SHAPES[name]) for name in ("batch of 9", "chunks of 5")] != [alone, alone]

    def test_a_prefix_key_that_forgets_the_tokens(self, setting, monkeypatch):
        harness, alone = setting

        def by_place(self, tokens, i):
            self.hashes[:] = [str(n).encode() for n in range(i + 1)]
            return self.hashes[i]

        engine = harness.engine(reuse_prefixes=True)
        monkeypatch.setattr("oxjax.cache.prefix.BlockHashes.at", by_place)
        harness.run_in(engine, prompts(1, 90, seed=5)[0])
        assert harness.run_in(engine, IDS) != alone

    @pytest.mark.parametrize("pool", ["pages", "slots"])
    def test_a_page_or_slot_that_two_sequences_write(self, setting, monkeypatch, pool):
        harness, alone = setting
        engine = harness.engine()
        monkeypatch.setattr(getattr(engine.pool, pool), "allocate", lambda n: list(range(1, n + 1)))
        monkeypatch.setattr(getattr(engine.pool, pool), "free", lambda pages: None)
        try:
            got = harness.run_in(engine, IDS, prompts(2, 50, seed=2))
        except (AssertionError, OxjaxError):
            return  # the engine's own checks noticed first
        assert got != alone

    @pytest.mark.usefixtures("traced_anew")
    def test_a_slot_that_leaks_into_the_next_sequence(self, setting, monkeypatch):
        from oxjax import batch

        harness, alone = setting
        layout = batch.row_layout

        def leaky(*args, **more):
            found = layout(*args, **more)
            slots = jnp.where(found.begins, found.write_slots, found.read_slots)
            return found.replace(begins=found.begins & False, read_slots=slots)

        monkeypatch.setattr("oxjax.models.decoder.row_layout", leaky)
        engine = harness.engine()
        harness.run_in(engine, prompts(1, 40, seed=2)[0])
        assert harness.run_in(engine, IDS) != alone

    def test_a_block_table_that_is_off_by_one(self, setting, monkeypatch):
        harness, alone = setting
        engine = harness.engine(reuse_prefixes=True)
        find = engine.pool.prefix._find
        monkeypatch.setattr(
            engine.pool.prefix,
            "_find",
            lambda *args: (found := find(*args))._replace(pages=found.pages[1:] + found.pages[:1]),
        )
        harness.run_in(engine, IDS)
        assert harness.run_in(engine, IDS) != alone

    def test_a_rewind_that_keeps_the_recurrent_state(self, setting, monkeypatch):
        from oxjax.cache.states import StatePool

        harness, _ = setting
        engine = harness.engine(reuse_prefixes=True)
        request = engine.generate(IDS, LONG, 11)
        while len(request.output.chunks) < 25:
            engine.step()

        def careless(self, state, position):
            state.position = self._slot_positions[state.slot] = position
            state.block_hashes.cut(position // self.page_size)

        with monkeypatch.context() as patch:
            patch.setattr(StatePool, "truncate", careless)
            engine.rewind(request, 95)
        engine.run([request])
        assert outcome(request) != harness.generated_alone(IDS, LONG)


@pytest.mark.parametrize(
    "exact,max_batch",
    [pytest.param(True, 16, id="exact"), pytest.param(False, 8, id="fast", marks=pytest.mark.slow)],
)
def test_short_prompts_join_decoding_neighbours(data, exact, max_batch):
    """Batches whose rows just fit their bucket while it has as many rows as there can be sequences."""
    harness = Harness(load("archs/llama", data, exact=exact))
    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    waves = [prompts(1, n, seed=n)[0] for n in (1, 2, 3, 1, 5, 2, 4, 9, 3)]
    engine = harness.engine(max_batch=max_batch, max_context=64)
    together = []
    for ids in waves:  # one more in every step
        together.append(engine.generate(ids, greedy, 0))
        engine.step()
    engine.run(together)
    for ids, got in zip(waves, together, strict=True):
        alone = harness.generated_alone(ids, greedy, 0)
        assert [token for token, *_ in outcome(got)] == [token for token, *_ in alone]
        assert not exact or outcome(got) == alone


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) for n in (STORIES, EMBEDDED)] + ["toy hybrid"]
)
def test_fast_mode_agrees_up_to_rounding(data, report, name):
    harness, other = (Harness(load(name, data, exact=e, weights="float32")) for e in (False, True))
    exact = np.frombuffer(other.alone(IDS)[0], np.float32)
    shapes = [SHAPES[name] for name in ("batch of 9", "one token at a time", "chunks of 5", "other page size")]
    worst = max(np.abs(np.frombuffer(harness.run(IDS, **shape)[0], np.float32) - exact).max() for shape in shapes)
    report(f"law, fast mode of {name}: largest deviation {worst / exact.std():.1e} of the logits' std, allowed 2e-5")
    # Float32 rounding through a few layers, as a share of the logits' spread; measured about 2e-6.
    assert worst / exact.std() < 2e-5


@pytest.mark.slow  # by default the embedded model is held to all of it, which is quantised
@pytest.mark.parametrize("name", [EMBEDDED, "quants/llama-mix-Q4_K_M"])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantised_weights_change_nothing_about_it(harnesses, expected, name, shape):
    harness = harnesses(name)
    is_quantised = isinstance(harness.model.params.layers[0].mlp.up.weight, QuantizedTensor)
    assert is_quantised == (native.kernels() is not None)
    assert harness.run(IDS, **SHAPES[shape]) == expected(harness)
