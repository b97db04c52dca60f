"""The law for embeddings: the bits of a text's hidden states depend on the model and the text alone."""

import numpy as np
import pytest

from oxjax.engine.encoder import MAX_TEXTS, Encoder
from oxjax.kernels.numerics import KV_BLOCK
from oxjax.kernels.text_attention import Q_TILE
from tests.helpers.law_harness import EMBEDDED, RANDOM, Harness, load, outcome, prompts

MINILM = "models/all-MiniLM-L6-v2/all-MiniLM-L6-v2-Q8_0"
SMALL = RANDOM + "encoder"
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("archs/bert", "archs/nomicbert", MINILM)]
LENGTHS = [1, 2, 15, 16, 17, Q_TILE - 1, Q_TILE, Q_TILE + 1, KV_BLOCK - 1, KV_BLOCK, KV_BLOCK + 1, 300]
for_encoders = pytest.mark.parametrize("model", [SMALL, *SLOW], indirect=True)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [rng.integers(1000, 30000, n).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def models(data):
    known = {}

    def get(name, **options):
        key = (name, *options.items())
        if key not in known:
            known[key] = load(name, data, **options)
        return known[key]

    return get


@pytest.fixture
def model(models, request):
    return models(request.param)


def encoder(model, max_rows):
    return Encoder(model.config, model.params, max_rows=max_rows, max_context=512)


def alone(model, texts):
    """Each text in a batch of its own, as small as it can be."""
    return [next(encoder(model, 16).run([ids])) for ids in texts]


@for_encoders
def test_company_order_and_padding(model, texts):
    """Many texts in a batch or few, in any order, in batches of any size."""
    expected = alone(model, texts)
    rng = np.random.default_rng(1)
    for max_rows in (64, 1024):
        for order in (range(len(texts)), range(len(texts))[::-1], rng.permutation(len(texts))):
            found = list(encoder(model, max_rows).run([texts[i] for i in order]))
            for i, rows in zip(order, found, strict=True):
                np.testing.assert_array_equal(rows, expected[i], err_msg=f"{LENGTHS[i]} rows, {max_rows} in a batch")


@for_encoders
def test_more_texts_than_a_batch_has(model, texts):
    """Twins in one batch and in the next are the same."""
    (expected,) = alone(model, texts[4:5])
    found = list(encoder(model, 1024).run([texts[4]] * (MAX_TEXTS + 3)))
    assert len(found) == MAX_TEXTS + 3
    for rows in found:
        np.testing.assert_array_equal(rows, expected)


@for_encoders
def test_other_texts_may_hold_nan(model, texts):
    """What one text holds does not reach another, not even through masks."""
    poisoned = model.params.embedding.at[5].set(np.nan)
    broken = model.replace(params=model.params.replace(embedding=poisoned))
    expected = alone(model, texts[4:6])
    first, between, last = encoder(broken, 256).run([texts[4], [5] * 40, texts[5]])
    assert np.isnan(between).all()
    np.testing.assert_array_equal(first, expected[0])
    np.testing.assert_array_equal(last, expected[1])


@pytest.mark.parametrize("name", [SMALL, *SLOW[:2]])
def test_fast_mode_holds_it_to_rounding_only(models, texts, name):
    """And, on the XLA backend, not to the bit, so the tests above can fail."""
    texts = texts[::4]  # each length compiles anew
    exact, fast = models(name, backend="xla"), models(name, backend="xla", exact=False)
    expected = alone(exact, texts)
    together, apart = list(encoder(fast, 1024).run(texts)), alone(fast, texts)
    for a, b, c in zip(together, apart, expected, strict=True):
        # Of values about 1: float32 in three layers.
        np.testing.assert_allclose(a, c, rtol=0, atol=2e-5)
        np.testing.assert_allclose(b, c, rtol=0, atol=2e-5)
    assert any((a != b).any() for a, b in zip(together, apart, strict=True))


@pytest.mark.parametrize("name", [EMBEDDED, pytest.param("toy hybrid", marks=pytest.mark.slow)])
def test_hidden_states_of_decoders(models, name):
    """Chunks, batch mates that generate, that are scored or are embedded as well, and page sizes."""
    harness, (ids,) = Harness(models(name)), prompts(1, 90)
    shapes = ({"max_rows": 256}, {"max_rows": 5}, {"max_rows": 16}, {"max_rows": 1, "max_batch": 1}, {"page_size": 64})
    found = []
    for i, shape in enumerate(shapes):
        engine = harness.engine(**shape)
        request = engine.hidden(ids)
        others = [engine.hidden(p) for p in prompts(2, 20, seed=1)] if i in (1, 2) else []
        others += [engine.logits(prompts(1, 30, seed=2)[0])] if i == 2 else []
        engine.run([request, *others])
        found.append(outcome(request))
    assert len(found[0]) == 4 * 90 * harness.model.config.d_model
    assert all(bits == found[0] for bits in found)
