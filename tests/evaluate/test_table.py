"""Results as columns."""

import json

import numpy as np
import pytest

from oxjax import LLM, SamplingParams
from oxjax.errors import BatchError, InvalidRequestError
from oxjax.evaluate import run, table
from tests.helpers.extras import require
from tests.helpers.request_files import mixed, write


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    source, output = write(tmp_path_factory.mktemp("table"), mixed(12))
    with LLM(max_batch=4, max_context=256) as llm:
        run(llm, source, output)
    return output


def test_a_row_is_an_answer(output):
    columns = table(output)
    records = {str(r["custom_id"]): r for r in map(json.loads, output.read_text().splitlines())}
    assert len({len(column) for column in columns.values()}) == 1
    for i, custom_id in enumerate(columns["custom_id"]):
        record, index = records[custom_id], columns["index"][i]
        if columns["error"][i] is not None:
            assert columns["error"][i] == record["error"]["message"]
            continue
        body = record["response"]["body"]
        if "scores" in body:
            assert columns["logprob"][i] == body["scores"][index]["logprob"]
        elif "data" in body:
            assert columns["embedding"][i] == body["data"][index]["embedding"]
        else:
            choice = body["choices"][index]
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            assert (columns["text"][i], columns["seed"][i]) == (text, choice["seed"])
    # 12 requests: 2 of 1, 2 of 3, 2 of 2, 2 of 2, 2 of 1 and 2 failed ones of 1.
    assert len(columns["index"]) == 20 and columns["index"].dtype == np.int64


@pytest.mark.parametrize(("form", "module"), [("pandas", "pandas"), ("arrow", "pyarrow")])
def test_other_forms_hold_the_same(output, form, module):
    require(module, "ray")
    found, columns = table(output, form), table(output)
    if form == "pandas":
        assert list(found.columns) == list(columns)
        assert found.custom_id.tolist() == columns["custom_id"].tolist()
        assert found.groupby("custom_id").size().sum() == 20
    else:
        assert found.column_names == list(columns)
        assert found["logprob"].to_pylist() == columns["logprob"].tolist()


def test_results_of_calls_have_columns():
    with LLM(max_context=64) as llm:
        scores = llm.score([("Once", " upon"), ("Once", " more")])
    columns = table(scores)
    assert columns["logprob"].dtype == np.float64 and columns["is_greedy"].dtype == bool
    assert columns["logprob"].tolist() == [s.logprob for s in scores]
    assert columns["token_ids"].tolist() == [s.token_ids for s in scores]
    assert table([]) == {}


@pytest.fixture(scope="module")
def results():
    with LLM(max_context=64) as llm:
        return llm.generate(["Once", "One"], SamplingParams(n=2, max_tokens=3, seed=1, logprobs=2))


@pytest.mark.parametrize(("form", "module"), [("numpy", "numpy"), ("pandas", "pandas"), ("arrow", "pyarrow")])
def test_samples_have_rows_of_their_own(results, form, module):
    require(module, "ray")
    found = table(results, form)
    columns = found.to_pydict() if form == "arrow" else {name: list(found[name]) for name in found}
    assert (columns["prompt"], columns["index"]) == ([0, 0, 1, 1], [0, 1, 0, 1])
    samples = [sample for result in results for sample in (result, *result.others)]
    assert columns["text"] == [sample.text for sample in samples]
    assert [list(ids) for ids in columns["token_ids"]] == [sample.token_ids for sample in samples]


def test_a_column_that_arrow_cannot_have_is_named(tmp_path):
    require("pyarrow", "ray")
    lines = [{"id": i, "input": "One", "encoding_format": form} for i, form in enumerate(("float", "base64"))]
    source, output = write(tmp_path, [json.dumps(line).encode() for line in lines])
    with LLM(max_context=64) as llm:
        run(llm, source, output)
    with pytest.raises(BatchError, match="column 'embedding'"):
        table(output, "arrow")


def test_a_file_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(BatchError, match="line 1"):
        table(tmp_path / "x.jsonl")


@pytest.mark.parametrize("path", ["none.jsonl", __file__])
def test_a_file_without_results_is_refused(tmp_path, path):
    with pytest.raises(BatchError, match="found no results"):
        table(tmp_path / path)


@pytest.mark.parametrize(("arguments", "message"), [(([], "polars"), "form"), (([1],), "expected results")])
def test_what_is_no_table_is_refused(arguments, message):
    with pytest.raises(InvalidRequestError, match=message):
        table(*arguments)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("oxjax.evaluate.tables.import_module", lambda name: __import__("no_such_" + name))
    with pytest.raises(BatchError, match="pip install pandas"):
        table([], "pandas")
