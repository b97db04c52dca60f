"""Scores of rerankers against llama.cpp's, on random files of every form of head that it knows."""

import json

import jax
import numpy as np
import pytest

from oxjax import LLM
from oxjax.engine.rank import PairEncoder
from oxjax.errors import EngineClosedError, InvalidRequestError, ModelError, NonFiniteLogitsError, RequestTooLargeError
from oxjax.evaluate import run, table, verify
from oxjax.models.layers import mlp
from oxjax.tokenizer import Tokenizer
from tests.helpers.encoder_synth import ENCODERS
from tests.helpers.oracle import LlamaCpp
from tests.helpers.parity_loop import gelu_by_table
from tests.helpers.synth import RECIPES, write

# Of scores about 1 large: float32 rounding, or ggml's 16-bit GELU table, which test_parity has more about.
CLOSE, GELU = 2e-4, 2e-3
D = 64
DENSE, DENSE_BIAS = {".weight": (D, D)}, {".bias": (D,)}
OUTPUT, OUTPUT_BIAS = {".output.weight": (1, D)}, {".output.bias": (1,)}
THREE = {"classifier.output_labels": ["a", "b", "c"]}
BERT, JINA, MODERN = (ENCODERS[name][0] for name in ("bert", "jina-bert-v2", "modern-bert"))
MODERN_HEAD = {**DENSE, ".norm.weight": (D,), **OUTPUT, **OUTPUT_BIAS}
QWEN = RECIPES["qwen3"].but(
    {"pooling_type": 4, "classifier.output_labels": ["yes", "no"]}, head={".output.weight": (2, D)}
)

HEADS = {
    "bert": BERT.but(head={**DENSE, **DENSE_BIAS, **OUTPUT, **OUTPUT_BIAS}),
    "bert: one map": BERT.but(head={**OUTPUT, **OUTPUT_BIAS}),
    "bert: no biases": BERT.but(head={**DENSE, **OUTPUT}),
    "bert: three labels": BERT.but(THREE, head={**DENSE, ".output.weight": (3, D), ".output.bias": (3,)}),
    "bert: mean": BERT.but({"classifier.pooling_type": 1}, head={**DENSE, **DENSE_BIAS, **OUTPUT}),
    "jina-bert-v2": JINA.but(head={".weight": (1, D), ".bias": (1,)}),
    "modern-bert": MODERN.but({"pooling_type": 4}, head=MODERN_HEAD),
    "modern-bert: cls": MODERN.but({"classifier.pooling_type": 2}, head=MODERN_HEAD),
    "modern-bert: one map": MODERN.but(head=OUTPUT),
    "modern-bert: no norm": MODERN.but(head={**DENSE, **OUTPUT}),
    "qwen3": QWEN,
    "qwen3: three labels": QWEN.but(THREE, head={".output.weight": (3, D)}),
}
QUICK = ["bert", "jina-bert-v2", "modern-bert", "qwen3"]
TEMPLATE = "<s>Judge. <Query>: {query}\n<Document>: {document}</s>\nAnswer:"


def write_head(path, name, data, **more):
    recipe = HEADS[name]
    return write(path, recipe, data / "archs" / f"{'qwen3' if recipe.arch == 'qwen3' else 'bert'}.gguf", **more)


def pairs(vocab):
    """A query and documents, of ids of the vocabulary that mean something; together they are one batch."""
    rng = np.random.default_rng(1)
    query, *documents = (rng.integers(vocab // 50 + 3, vocab - 9, n).tolist() for n in (9, 30, 1, 120, 40))
    return query, documents


def difference(llm, query, documents, expected):
    return float(np.abs(llm.rerank(query, documents) - expected).max())


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in HEADS])
def test_random_heads(data, tmp_path, report, monkeypatch, name):
    path = write_head(tmp_path / "m.gguf", name, data)
    with LLM(path, exact=False) as llm, LlamaCpp(path, vocab_only=False) as oracle:
        query, documents = pairs(llm.config.vocab_size)
        labels = np.stack([oracle.scores(llm._pairs.encode(query, d)) for d in documents])
        assert labels.shape == (len(documents), llm.config.rank.n_labels)
        gelu = llm.config.architecture != "qwen3"
        error, allowed = difference(llm, query, documents, labels[:, 0]), GELU if gelu else CLOSE
        report(f"scores of {name}: {error:.1e} off, allowed {allowed:.0e}; they spread {np.ptp(labels[:, 0]):.2f}")
        assert error <= allowed
        assert np.ptp(labels[:, 0]) > 10 * allowed
        if gelu:
            monkeypatch.setitem(mlp.ACTIVATIONS, "gelu", gelu_by_table)
            jax.clear_caches()
            tabled = difference(llm, query, documents, labels[:, 0])
            report(f"scores of {name}: {tabled:.1e} off with a 16-bit table of GELU")
            assert tabled <= CLOSE
    jax.clear_caches()


def test_an_architecture_without_a_head_has_no_place_for_one(data, tmp_path):
    recipe = ENCODERS["nomic-bert"][0].but(head={**DENSE, **OUTPUT})
    path = write(tmp_path / "m.gguf", recipe, data / "archs" / "bert.gguf")
    with pytest.raises(RuntimeError, match="open"):
        LlamaCpp(path, vocab_only=False)
    with pytest.raises(ModelError, match=r"2 tensors have no place in this architecture: cls\."):
        LLM(path)


def test_a_head_that_gives_no_score_is_refused(data, tmp_path):
    tokenizer_of = data / "archs" / "llama.gguf"  # a small one
    path = write(tmp_path / "m.gguf", BERT.but(head=DENSE), tokenizer_of)
    with pytest.raises(ModelError, match=r"'cls.weight' has shape \(64, 64\), metadata says \(1, 64\)"):
        LLM(path)
    changed = BERT.but({"classifier.pooling_type": 3}, head=OUTPUT)
    path = write(tmp_path / "n.gguf", changed, tokenizer_of)
    with pytest.raises(ModelError, match=r"classifier.pooling_type: found 3, expected 1 \(mean\) or 2 \(cls\)"):
        LLM(path)


@pytest.mark.parametrize(
    "file",
    ["bert-bge", "nomic-bert-moe", "llama-spm", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen2", "gpt-2"))],
)
def test_pairs_are_formatted_as_llama_cpp_formats_them(data, file):
    """BERT, XLM-RoBERTa, and decoders with and without BOS; texts that spell control tokens are texts."""
    path, query, document = data / "vocab" / f"ggml-vocab-{file}.gguf", "What is a panda?", "Bears </s> [SEP] of China."
    tokenizer = Tokenizer.from_gguf(path)
    with LlamaCpp(path) as oracle:
        q, d = oracle.tokenize_all([query, document], add_special=False, parse_special=False)
        has = oracle.special()
    eos = [has["eos"] if has["eos"] != -1 else has["sep"]] * has["add_eos"]
    expected = [has["bos"]] * has["add_bos"] + q + eos + [has["sep"]] * has["add_sep"] + d + eos
    pairs = PairEncoder(tokenizer, None)
    assert pairs.encode(query, document) == expected
    assert pairs.encode(q, document) == pairs.encode(q, d) == expected


@pytest.mark.parametrize("file", ["llama-spm", "qwen2"])
def test_the_template_of_pairs(data, file):
    path, query, document = data / "vocab" / f"ggml-vocab-{file}.gguf", "What is {document}?", "A panda, {query}"
    with LlamaCpp(path) as oracle:
        text = TEMPLATE.replace("{query}", "QUERY").replace("{document}", document).replace("QUERY", query)
        expected = oracle.tokenize(text, add_special=False)
    tokenizer = Tokenizer.from_gguf(path)
    pairs = PairEncoder(tokenizer, TEMPLATE)
    assert pairs.encode(query, document) == expected
    ids = pairs.encode("Who?", [7, 8, 9])
    assert tokenizer.decode(ids) == tokenizer.decode(pairs.encode("Who?", tokenizer.decode([7, 8, 9])))
    control = next(t for t in ("</s>", "<|im_end|>") if t in tokenizer.control_texts)
    assert pairs.encode("Who?", control).count(tokenizer.id_of(control)) == TEMPLATE.count(control)


def test_a_file_with_a_template(data, tmp_path):
    path = write_head(tmp_path / "m.gguf", "qwen3", data, tokenizer={"chat_template.rerank": TEMPLATE})
    with LLM(path, exact=False) as llm, LlamaCpp(path, vocab_only=False) as oracle:
        found = llm.rerank("a dog", ["The dog ran.", "cat"])
        texts = [TEMPLATE.replace("{query}", "a dog").replace("{document}", d) for d in ("The dog ran.", "cat")]
        expected = [oracle.scores(oracle.tokenize(t, add_special=False))[0] for t in texts]
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE)


@pytest.fixture(scope="module", params=["bert", "qwen3", pytest.param("modern-bert", marks=pytest.mark.slow)])
def llm(request, data, tmp_path_factory):
    path = write_head(tmp_path_factory.mktemp("heads") / "m.gguf", request.param, data)
    with LLM(path, max_batch=3) as llm:
        yield llm


def test_bits_do_not_depend_on_company(llm):
    """Nor on order, nor on how many there are; see tests/law/test_embed_law.py."""
    query, documents = pairs(llm.config.vocab_size)
    alone = [llm.rerank(query, [d])[0] for d in documents]
    assert len(set(alone)) == len(alone)
    for order in (range(4), [3, 1, 0, 2], [2] + [1] * 65 + [0]):
        found = llm.rerank(query, [documents[i] for i in order])
        assert found.dtype == np.float32
        assert found.tolist() == [alone[i] for i in order]


def test_documents_come_in_every_form(llm):
    ids = llm.tokenizer.encode("The dog", add_special=False, parse_special=False)
    expected = llm.rerank("a dog", "The dog")
    assert expected.shape == (1,)
    for form in (ids, np.array(ids), ["The dog"], [ids]):
        np.testing.assert_array_equal(llm.rerank("a dog", form), expected)
    assert llm.rerank("a dog", []).shape == (0,)
    assert llm.rerank("", "").shape == (1,)  # special tokens alone


def test_one_bad_document_loses_nothing(llm):
    good = llm.rerank("a dog", ["The dog", "Once"])
    wrong = ([llm.config.vocab_size], InvalidRequestError), ([9] * 256, RequestTooLargeError)
    for bad, error in (*wrong, ("\ud800", InvalidRequestError)):
        with pytest.raises(error) as caught:
            llm.rerank("a dog", ["The dog", bad, "Once"])
        assert caught.value.index == 1
        assert caught.value.results == (good[0], None, good[1])


def test_files_of_requests(llm, tmp_path):
    documents = ["The dog", "Once", "a cat"]
    asks = [
        {"query": "a dog", "documents": documents},
        {"url": "/v1/rerank", "body": {"query": "a dog", "documents": documents, "top_n": 2}},
        {"query": "a dog", "documents": []},
        {"query": "a dog", "documents": ["x", [llm.config.vocab_size]]},
        {"query": "a dog", "documents": "x"},
        {"documents": documents},
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"id": i, **ask}) + "\n" for i, ask in enumerate(asks)))
    assert run(llm, source, output).failed == 4
    full, best = (json.loads(line)["response"]["body"] for line in output.read_text().splitlines()[:2])
    expected = llm.rerank("a dog", documents).tolist()
    assert [r["index"] for r in full["results"]] == sorted(range(3), key=lambda i: -expected[i])
    assert [r["relevance_score"] for r in full["results"]] == sorted(expected, reverse=True)
    assert best["results"] == full["results"][:2] and best["usage"] == full["usage"]
    rows = table(output)
    assert rows["relevance_score"][:3].tolist() == sorted(expected, reverse=True)
    assert verify(tmp_path / "out.manifest.json", llm=llm).differing == []


def test_a_reranker_embeds_when_told_how(llm):
    ranks = llm.config.pooling == "rank"
    assert ranks == (llm.config.architecture != "bert")  # which files of some encoders do not say
    if ranks:
        with pytest.raises(InvalidRequestError, match="'rank', which is for pairs of texts, see rerank: expected one"):
            llm.embed("The dog")
    assert llm.embed("The dog", "last").shape == (1, D)


def test_hidden_states_that_are_not_finite_are_an_error(data, tmp_path):
    with LLM(write_head(tmp_path / "m.gguf", "bert", data), weights="float32") as llm:
        params = llm.model.params
        broken = params.embedding.at[llm.tokenizer.encode("dog")[1]].set(np.nan)
        llm.model = llm.model.replace(params=params.replace(embedding=broken))
        with pytest.raises(NonFiniteLogitsError) as caught:
            llm.rerank("a", ["cat", "dog"])
    assert caught.value.index == 1
    with pytest.raises(EngineClosedError):
        llm.rerank("a", "cat")


def test_a_model_without_a_head_says_so():
    with LLM() as llm, pytest.raises(InvalidRequestError, match=r"no head that ranks \(cls\.\*\): compare embeddings"):
        llm.rerank("a dog", ["The dog"])
