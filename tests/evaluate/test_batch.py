"""Files of requests: every kind gives what the calls give, and no crash, interrupt or failure loses anything."""

import base64
import json
import signal

import jax
import numpy as np
import pytest

from oxjax import LLM, SamplingParams
from oxjax.errors import BatchError, CacheError, EngineClosedError
from oxjax.evaluate import batch, run, verify
from oxjax.evaluate.prepare import RequestPreparer
from oxjax.evaluate.request_format import params_of, read_line
from tests.helpers.request_files import TEMPLATE, bodies, mixed, write


@pytest.fixture(scope="module")
def whole(llm, tmp_path_factory):
    """A run of 60 requests that nothing disturbed."""
    source, output = write(tmp_path_factory.mktemp("whole"), mixed(60))
    summary = run(llm, source, output)
    assert (summary.total, summary.done, summary.failed, summary.found) == (60, 60, 10, 0) and summary.complete
    assert sorted(p.name for p in output.parent.iterdir()) == ["in.jsonl", "out.jsonl", "out.manifest.json"]
    return source, output.read_bytes()


def test_answers_are_what_the_calls_give(llm, whole, tmp_path):
    (tmp_path / "out.jsonl").write_bytes(whole[1])
    found, asked = bodies(tmp_path / "out.jsonl"), [read_line(line) for line in mixed(60) if b"top_p" not in line]
    preparer = RequestPreparer(llm, 0, "2024-02-29")
    for ask in asked:
        body, got = ask.body, found[ask.custom_id]
        if ask.kind == "score":
            scores = llm.score([(body["context"], c) for c in body["continuations"]])
            assert [s["token_logprobs"] for s in got["scores"]] == [s.token_logprobs for s in scores]
            assert [s["is_greedy"] for s in got["scores"]] == [s.is_greedy for s in scores]
        elif ask.kind == "embed":
            data = [np.frombuffer(base64.b64decode(d["embedding"]), "<f4") for d in got["data"]]
            np.testing.assert_array_equal(data, llm.embed(body["input"]))
        elif ask.kind == "generate":
            params = params_of(body, preparer._seed_of(ask), "prompt")
            (result,) = llm.generate(body["prompt"], params)
            assert [c["text"] for c in got["choices"]] == [r.text for r in (result, *result.others)]
            assert [c["token_ids"] for c in got["choices"]] == [r.token_ids for r in (result, *result.others)]
            if "logprobs" in body:
                assert got["choices"][0]["logprobs"]["token_logprobs"] == result.logprobs
            assert got["usage"]["prompt_tokens"] == len(result.prompt_token_ids)
        else:
            (choice,) = got["choices"]
            params = SamplingParams(max_tokens=4, seed=choice["seed"])
            answer = llm.chat(body["messages"], params, template=TEMPLATE)
            assert (choice["message"]["content"], choice["token_ids"]) == (answer.content, answer.results[0].token_ids)


def test_answers_come_in_the_order_of_the_lines(whole):
    ids = [str(read_line(line).custom_id) for line in mixed(60)]
    assert [json.loads(line)["custom_id"] for line in whole[1].splitlines()] == ids


def test_neither_batch_size_nor_window_changes_a_byte(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "WINDOW", 7)
    source, output = write(tmp_path, mixed(60))
    with LLM(max_batch=1, max_context=256) as other:
        run(other, source, output)
    assert output.read_bytes() == whole[1]


@pytest.mark.parametrize("n_steps", [0, 1, 3, 10])
def test_an_interrupt_stops_between_steps(llm, whole, tmp_path, n_steps):
    source, output = write(tmp_path, mixed(60))
    seen, before = [], signal.getsignal(signal.SIGINT)

    def interrupt(progress):
        seen.append(progress)
        if len(seen) == n_steps + 1:
            signal.raise_signal(signal.SIGINT)

    summary = run(llm, source, output, progress=interrupt)
    assert not summary.complete and summary.done == seen[-1].done and len(seen) == n_steps + 1
    assert llm.metrics().running == llm.metrics().waiting == 0
    again = run(llm, source, output)
    assert again.complete and again.found == summary.done
    assert output.read_bytes() == whole[1]
    assert signal.getsignal(signal.SIGINT) is before


def test_shards_are_parts_of_the_whole(llm, whole, tmp_path):
    parts = []
    for i in (1, 2, 3):
        source, output = write(tmp_path, mixed(60))
        output = tmp_path / f"out{i}.jsonl"
        run(llm, source, output, shard=(i, 3))
        parts += output.read_bytes().splitlines()
    # A failure names the line of the file, as it does in the whole.
    assert sorted(parts) == sorted(whole[1].splitlines())
    for bad in ((0, 3), (4, 3)):
        with pytest.raises(BatchError, match="shard"):
            run(llm, source, tmp_path / "x.jsonl", shard=bad)


def test_an_encoder_embeds_files(data, tmp_path):
    texts = [f"text number {i} " * (1 + i % 5) for i in range(70)]
    lines = [json.dumps({"id": i, "input": t, "pooling": "mean", "truncate": 9}).encode() for i, t in enumerate(texts)]
    source, output = write(tmp_path, [*lines, b'{"id": "x", "prompt": "x"}'])
    with LLM(data / "models" / "all-MiniLM-L6-v2") as llm:
        assert run(llm, source, output).failed == 1
        got = [b["data"][0]["embedding"] for b in bodies(output).values() if b]
        np.testing.assert_array_equal(np.array(got, np.float32), llm.embed(texts, truncate=9))
        assert verify(tmp_path / "out.manifest.json", llm=llm).differing == []


def test_what_is_wrong_with_the_engine_is_no_requests_fault(tmp_path):
    source, output = write(tmp_path, mixed(12))
    with LLM(max_batch=4, max_context=10**10) as llm, pytest.raises(CacheError, match="lower max_context"):
        run(llm, source, output)
    with LLM(max_batch=4, max_context=256) as llm, pytest.raises(EngineClosedError):
        run(llm, source, output, progress=lambda _: llm.close())
    found = output.read_bytes() + (tmp_path / "out.pending").read_bytes()
    assert found.count(b'"error": {') == sum(b"top_p" in line for line in mixed(12))


def test_a_device_that_fails_is_no_requests_fault(llm, tmp_path, monkeypatch):
    source, output = write(tmp_path, mixed(12))

    def fails(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    with monkeypatch.context() as patch:
        patch.setattr("oxjax.evaluate.prepare.pool", fails)
        with pytest.raises(jax.errors.JaxRuntimeError):
            run(llm, source, output)
    assert run(llm, source, output).failed == 2
