"""What a closed `LLM` leaves on the device: nothing, whoever still holds a result, a stream or an error."""

import gc

import jax
import pytest

from oxjax import LLM, BeamParams, Grammar, SamplingParams
from oxjax.assets import embedded_model
from oxjax.errors import EngineClosedError, RequestTooLargeError

SMALL = 4096  # bytes that may stay: token ids and masks of the engine, where somebody holds that
GREEDY = SamplingParams(max_tokens=4, temperature=0.0)


def held():
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.fixture
def freed():
    """Checks at the end that the test left no array behind, while `keep` still holds what it was given."""
    before, keep = held(), []
    yield keep
    assert held() - before <= SMALL
    keep.clear()
    assert held() == before


def use(llm):
    """A little of everything."""
    before = held()
    if llm.config.causal:
        results = llm.generate(["Once", "The dog"], SamplingParams(max_tokens=4, seed=1, n=2, logprobs=2))
        results += llm.generate("Once", SamplingParams(max_tokens=4, seed=1, grammar=Grammar.regex("[a-z ]+")))
        results += llm.beam_search("Once", BeamParams(width=2), GREEDY)
        results += llm.logits("Once")
    else:
        results = []
    assert held() >= before > 1 << 20
    return [*results, llm.embed(["Once", "The dog"])]


@pytest.mark.parametrize(
    "other", ["models/all-MiniLM-L6-v2", pytest.param("archs/mamba2.gguf", marks=pytest.mark.slow)]
)
def test_models_one_after_another(freed, data, other):
    before = held()
    for path in (embedded_model(), data / other, embedded_model()):
        with LLM(path, max_context=64) as llm:
            freed += use(llm)
        assert held() == before


def test_an_exception_inside(freed):
    with pytest.raises(KeyError) as caught, LLM(max_context=64) as llm:
        freed.append(llm.generate("Once", GREEDY))
        raise KeyError
    freed.append(caught)


@pytest.mark.parametrize("encoder", [False, True])
def test_an_error_that_is_kept(freed, data, encoder):
    """Its traceback holds the frames of the engine, as a notebook's last error does."""
    model = data / "models" / "all-MiniLM-L6-v2" if encoder else embedded_model()
    with pytest.raises(RequestTooLargeError) as caught, LLM(model, max_context=64) as llm:
        llm.embed(["Once", [5] * 65])
    freed.append(caught)


def test_what_was_under_way(freed):
    with LLM(max_context=64) as llm:
        stream = llm.stream("Once", SamplingParams(seed=1))
        next(stream)
        request = llm.engine.generate(llm.tokenizer.encode("The dog"), GREEDY, seed=1)
        llm.engine.step()
        engine = llm.engine
        freed += [llm, engine, stream, request, engine.snapshot()]
    with pytest.raises(EngineClosedError):
        list(stream)
    with pytest.raises(EngineClosedError):
        engine.step()


def test_an_abandoned_stream_ends_quietly():
    with LLM(max_context=64) as llm:
        stream = llm.stream("Once", SamplingParams(seed=1))
        next(stream)
    stream.close()
    assert list(stream) == []
