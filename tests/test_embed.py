"""`LLM.embed` on a real encoder and a real decoder: reference embeddings, every pooling, errors that lose nothing."""

import json

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from oxjax import LLM, SamplingParams
from oxjax.assets import embedded_model
from oxjax.errors import (
    EngineClosedError,
    InvalidRequestError,
    NonFiniteLogitsError,
    RequestTooLargeError,
    SnapshotError,
    UnsupportedArchitectureError,
)

POOLINGS = ["mean", "max", "cls", "last"]


@pytest.fixture(scope="module")
def minilm(data):
    return data / "models" / "all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def cases(minilm):
    return json.loads((minilm / "reference.json").read_text())


@pytest.fixture(scope="module")
def encoder(minilm):
    with LLM(minilm, weights="float32") as llm:
        yield llm


@pytest.fixture(scope="module")
def decoder():
    with LLM(embedded_model()) as llm:
        yield llm


@pytest.fixture(params=["encoder", "decoder"])
def llm(request):
    return request.getfixturevalue(request.param)


def difference(llm, cases, report, what):
    texts, expected = [c["text"] for c in cases], np.array([c["embedding"] for c in cases])
    assert [llm.tokenizer.encode(t) for t in texts] == [c["ids"] for c in cases]
    got = llm.embed(texts)
    assert got.dtype == np.float32
    cosine = np.sum(got * expected, axis=1) / np.linalg.norm(got, axis=1) / np.linalg.norm(expected, axis=1)
    worst = float(np.abs(got - expected).max())
    report(f"all-MiniLM-L6-v2, {what}: {worst:.1e} off at most, cosine at least {cosine.min():.9f}")
    assert cosine.min() > 0.99999
    return worst


def test_the_real_encoder_gives_the_reference_embeddings(encoder, cases, report):
    # Of numbers about 0.05 large: llama.cpp looks GELU up in a table of 16-bit floats, see the next test.
    assert difference(encoder, cases, report, "GELU") < 1.5e-4


def test_quantised_products_give_nearly_the_same(minilm, cases, report):
    """By default the matrices stay the file's integers, and activations are rounded to 8 bits."""
    expected = np.array([c["embedding"] for c in cases])
    with LLM(minilm) as llm:
        got = llm.embed([c["text"] for c in cases])
    cosine = np.sum(got * expected, axis=1)
    report(f"all-MiniLM-L6-v2, quantised products: cosine at least {cosine.min():.6f}")
    assert cosine.min() > 0.998


def bert_in_float64(path, ids):
    """Mean-pooled, normalised hidden states; numpy alone, weights as the `gguf` package decodes them."""
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}

    def get(name):
        t = tensors[name]
        return gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64).reshape(t.shape[::-1])

    def affine(name, x):
        return x @ get(f"{name}.weight").T + get(f"{name}.bias")

    def norm(name, x):
        x = x - x.mean(axis=-1, keepdims=True)
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-12) * get(f"{name}.weight") + get(f"{name}.bias")

    x = get("token_embd.weight")[ids] + get("token_types.weight")[0] + get("position_embd.weight")[: len(ids)]
    x = norm("token_embd_norm", x)
    for i in range(6):
        q, k, v = (affine(f"blk.{i}.attn_{n}", x).reshape(len(ids), 12, 32).swapaxes(0, 1) for n in "qkv")
        scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(32))
        mixed = (scores / scores.sum(axis=-1, keepdims=True) @ v).swapaxes(0, 1).reshape(len(ids), 384)
        x = norm(f"blk.{i}.attn_output_norm", x + affine(f"blk.{i}.attn_output", mixed))
        up = affine(f"blk.{i}.ffn_up", x)
        act = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * up * (1 + 0.044715 * up * up)))
        x = norm(f"blk.{i}.layer_output_norm", x + affine(f"blk.{i}.ffn_down", act))
    mean = x.mean(axis=0)
    return mean / np.linalg.norm(mean)


def test_what_is_left_is_llama_cpps(encoder, minilm, cases, report):
    """In float64 the same model gives what we give: the difference is the other side's GELU."""
    ids, theirs = cases[5]["ids"], np.array(cases[5]["embedding"])
    true = bert_in_float64(next(minilm.glob("*.gguf")), ids)
    ours, other = (float(np.abs(x - true).max()) for x in (encoder.embed([ids])[0], theirs))
    report(f"all-MiniLM-L6-v2 against float64: we are {ours:.1e} off, the reference {other:.1e}")
    assert ours < 2e-6
    assert other > 10 * ours


def test_similar_texts_are_similar(encoder):
    cat, feline, earnings = encoder.embed(
        ["The cat sits on the mat.", "A feline rests on a rug.", "Quarterly earnings beat expectations."]
    )
    assert cat @ feline > 0.5
    assert cat @ earnings < 0.2


@pytest.mark.parametrize("pooling", POOLINGS)
def test_poolings_are_what_numpy_makes_of_the_tokens(llm, pooling):
    texts = ["Once upon a time", "The dog", "a"]
    tokens = llm.embed(texts, pooling="none", normalize=False)
    assert [len(t) for t in tokens] == [len(llm.tokenizer.encode(t)) for t in texts]
    of = {
        "mean": lambda t: t.mean(axis=0),
        "max": lambda t: t.max(axis=0),
        "cls": lambda t: t[0],
        "last": lambda t: t[-1],
    }
    expected = np.stack([of[pooling](t.astype(np.float64)) for t in tokens])
    np.testing.assert_allclose(llm.embed(texts, pooling, normalize=False), expected, rtol=1e-6, atol=0)
    unit = llm.embed(texts, pooling)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6, atol=0)
    np.testing.assert_allclose(unit, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-5, atol=1e-7)
    assert (unit == llm.embed(texts)).all() == (pooling == llm.config.pooling)


def test_poolings_differ(llm):
    vectors = [llm.embed("Once upon a time", p)[0] for p in POOLINGS]
    assert all(np.abs(a - b).max() > 0.01 for i, a in enumerate(vectors) for b in vectors[:i])


def test_vectors_of_tokens_are_of_length_one_too(llm):
    (tokens,) = llm.embed("Once upon a time", "none")
    np.testing.assert_allclose(np.linalg.norm(tokens, axis=1), 1, rtol=1e-6, atol=0)


def test_texts_come_in_every_form(llm):
    ids = llm.tokenizer.encode("The dog")
    expected = llm.embed("The dog")
    assert expected.shape == (1, llm.config.d_model)
    for form in (ids, np.array(ids), ["The dog"], [ids]):
        np.testing.assert_array_equal(llm.embed(form), expected)
    assert llm.embed([]).shape == (0, llm.config.d_model)
    assert llm.embed([], "none") == []


def test_default_poolings(encoder, decoder):
    assert encoder.config.pooling == "mean"  # as the file says
    assert decoder.config.pooling == "last"


def test_one_bad_text_loses_nothing(llm):
    good = llm.embed(["The dog", "Once"])
    ids = llm.tokenizer.encode("a")
    limit = llm.max_context
    for bad, error in (
        ([], InvalidRequestError),
        ([llm.config.vocab_size], InvalidRequestError),
        (ids * (limit + 1), RequestTooLargeError),
    ):
        with pytest.raises(error) as caught:
            llm.embed(["The dog", bad, "Once"])
        assert caught.value.index == 1
        assert caught.value.results[1] is None
        np.testing.assert_array_equal([caught.value.results[0], caught.value.results[2]], good)


@pytest.mark.parametrize("pooling", ["avg", "rank", ""])
def test_unknown_poolings_are_refused(llm, pooling):
    with pytest.raises(InvalidRequestError, match=r"pooling .*: expected one of none, mean, max, cls, last"):
        llm.embed("a", pooling)


def test_a_text_may_fill_the_context(encoder):
    assert encoder.max_context == 512
    assert encoder.embed([list(range(1000, 1512))]).shape == (1, 384)


def bert_tokenizer(llm):
    """What sentence-transformers has for the model: BERT's tokenizer, of the `tokenizers` package."""
    texts = [llm.tokenizer.token_text(i) for i in range(llm.tokenizer.vocab_size)]
    known = {
        t.removeprefix("▁") if t.startswith("▁") or t.startswith("[") else f"##{t}": i for i, t in enumerate(texts)
    }
    made = Tokenizer(models.WordPiece(known, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", llm.tokenizer.bos_id), ("[SEP]", llm.tokenizer.sep_id)]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return made


def test_long_texts_are_cut_as_sentence_transformers_cuts_them(encoder, cases):
    theirs, texts = bert_tokenizer(encoder), [c["text"] for c in cases] + ["a panda " * 2000, ""]
    for n in (2, 3, 8, 512):
        theirs.enable_truncation(n)
        ids = [theirs.encode(t).ids for t in texts]
        assert max(map(len, ids)) == n
        np.testing.assert_array_equal(encoder.embed(texts, truncate=n), encoder.embed(ids))


def test_cutting(llm):
    """Ids are cut as they are; texts that are short enough stay; what is not cut is refused."""
    ids, long = llm.tokenizer.encode("The dog"), "The dog " * 2000
    assert [len(t) for t in llm.embed([long, "The dog", ids * 20], "none", truncate=9)] == [9, len(ids), 9]
    np.testing.assert_array_equal(llm.embed([ids * 20], truncate=9), llm.embed([(ids * 20)[:9]]))
    np.testing.assert_array_equal(llm.embed("The dog", truncate=llm.max_context), llm.embed("The dog"))
    with pytest.raises(RequestTooLargeError) as caught:
        llm.embed(["The dog", long])
    assert caught.value.index == 1
    for n in (-1, 0, llm.max_context + 1):
        with pytest.raises(InvalidRequestError, match=rf"truncate {n}: expected \d, .* to {llm.max_context}"):
            llm.embed("The dog", truncate=n)


def test_an_empty_text_is_its_special_tokens(llm, monkeypatch):
    ids = llm.tokenizer.encode("")
    assert ids == [i for i in (llm.tokenizer.bos_id, llm.tokenizer.sep_id) if i is not None]
    np.testing.assert_array_equal(llm.embed(["", "The dog"])[0], llm.embed([ids])[0])
    monkeypatch.setattr(llm.tokenizer, "encode", lambda text, max_length: [])  # of a vocabulary that adds none
    with pytest.raises(InvalidRequestError, match="the prompt is empty"):
        llm.embed("")


def test_an_encoder_generates_nothing(encoder):
    for call in (encoder.generate, encoder.logits, encoder.stream):
        with pytest.raises(
            UnsupportedArchitectureError, match="bert models encode texts and generate nothing: use embed"
        ):
            call("Once")
    assert encoder.embed("Once").shape == (1, 384)


def test_hidden_states_that_are_not_finite_are_an_error(minilm):
    with LLM(minilm, weights="float32") as llm:
        params = llm.model.params
        broken = params.embedding.at[llm.tokenizer.encode("dog")[1]].set(jnp.nan)
        llm.model = llm.model.replace(params=params.replace(embedding=broken))
        with pytest.raises(NonFiniteLogitsError, match="hidden states") as caught:
            llm.embed(["cat", "dog", "cat"])
        assert caught.value.index == 1
        np.testing.assert_array_equal(caught.value.results[0], caught.value.results[2])
        assert np.isfinite(caught.value.results[0]).all()


def test_after_warm_up_nothing_compiles(data):
    rng = np.random.default_rng(0)
    for path in (data / "archs" / "bert.gguf", embedded_model()):
        with LLM(path, max_context=40, max_batch=2, max_rows=32) as llm:
            llm.warm_up(embeddings=True)
            counts = (llm.engine.runner if llm.config.causal else llm.encoder).compilations
            before = counts.copy()
            for n in (1, 2, 40):  # more texts than a batch has
                llm.embed([rng.integers(3, 500, rng.integers(1, 40)).tolist() for _ in range(n)])
            assert counts == before


def test_a_closed_llm_says_so(minilm):
    llm = LLM(minilm)
    llm.embed("a")
    llm.close()
    with pytest.raises(EngineClosedError):
        llm.embed("a")


def test_embedding_and_generating_at_once_change_nothing(decoder):
    """A decoder embeds while a stream is under way, in the same steps."""
    drawn = SamplingParams(max_tokens=12, seed=3)
    alone, (expected,) = decoder.generate("The dog", drawn)[0], decoder.embed("Once upon a time", "none")
    stream = decoder.stream("The dog", drawn)
    chunks = [next(stream)]
    (embedded,) = decoder.embed("Once upon a time", "none")
    chunks += stream
    np.testing.assert_array_equal(embedded, expected)
    assert [c.token_id for c in chunks] == alone.token_ids
    assert [c.logprob for c in chunks] == alone.logprobs


def test_logits_and_hidden_states_share_steps(decoder):
    ids, engine = decoder.tokenizer.encode("Once upon a time"), decoder.engine
    requests = [engine.logits(ids), engine.hidden(ids), engine.logits(ids[:3])]
    with pytest.raises(SnapshotError, match="hidden states"):
        engine.snapshot()
    engine.run(requests)
    np.testing.assert_array_equal(np.concatenate(requests[0].rows), decoder.logits(ids)[0])
    np.testing.assert_array_equal(np.concatenate(requests[2].rows), decoder.logits(ids[:3])[0])
    np.testing.assert_array_equal(np.concatenate(requests[1].rows), decoder.embed([ids], "none", normalize=False)[0])
