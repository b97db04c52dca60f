"""Files of requests: every kind gives what the calls give, and no crash, interrupt or bad line loses anything."""

import base64
import json
import signal
from contextlib import suppress
from datetime import datetime

import gguf
import jax
import numpy as np
import pytest

from oxjax import LLM, Grammar, SamplingParams
from oxjax.errors import BatchError, CacheError, EngineClosedError, InvalidRequestError, OxjaxError
from oxjax.evaluate import batch, run, verify
from oxjax.evaluate.journal import Journal
from oxjax.evaluate.manifest import Manifest, facts
from oxjax.evaluate.prepare import RequestPreparer
from oxjax.evaluate.request_format import BatchRequest, params_of, read_line
from tests.helpers.request_files import TEMPLATE, mixed, write
from tests.helpers.rewrite import rewrite


@pytest.fixture(scope="module")
def llm():
    with LLM(max_batch=4, max_context=256) as llm:
        yield llm


def bodies(output):
    records = [json.loads(line) for line in output.read_text().splitlines()]
    return {r["custom_id"]: r["response"] and r["response"]["body"] for r in records}


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


def test_bad_lines_are_reported_with_their_numbers(llm, tmp_path):
    good = {"id": "a", "prompt": "One", "max_tokens": 2, "seed": 1}
    bad = [
        b"not json",
        b'["a"]',
        b"{}",
        b'{"prompt": "no id"}',
        b'{"id": "a", "prompt": "repeated"}',
        b'{"id": "b"}',
        b'{"id": "c", "prompt": "x", "messages": []}',
        b'{"id": "d", "url": "/v1/other", "body": {}}',
        b'{"id": "e", "prompt": "x", "colour": 1}',
        b'{"id": "f", "prompt": [99999]}',
        b'{"id": "g", "prompt": ' + json.dumps("x " * 600).encode() + b"}",
        b'{"id": "h", "messages": [{"role": "user", "content": "x"}]}',  # the model has no template
        b'{"id": "k", "prompt": []}',
        b'{"id": "l", "input": []}',
        b'{"id": "m", "query": "x", "documents": ["y"]}',  # the model has no head
        b'{"id": "n", "messages": [{"role": "user", "content": "x"}], "chat_template": "x", '
        b'"chat_template_kwargs": {"date": ""}}',
        b'{"id": "i", "continuations": [[5]], "context": [4], "max_tokens": 3}',
        b'{"id": "j", "prompt": "x", "grammar": {"regex": "("}}',
        b'{"id": "\\ud800", "prompt": "x"}',
        b"[" * 100_000,
        b"\xff\xfe",
    ]
    source, output = write(tmp_path, [json.dumps(good).encode(), b"", *bad, json.dumps(good | {"id": "z"}).encode()])
    summary = run(llm, source, output)
    assert (summary.done, summary.failed) == (len(bad) + 2, len(bad))
    first, *errors, last = [json.loads(line) for line in output.read_text().splitlines()]
    assert first["error"] is last["error"] is None
    assert first["response"]["body"] == last["response"]["body"]
    assert [e["error"]["line"] for e in errors] == list(range(3, 3 + len(bad)))
    assert all(e["response"] is None and e["error"]["message"] for e in errors)
    assert str(llm.path.parent) not in output.read_text()  # which results do not depend on
    assert run(llm, source, output).failed == len(bad)

    source, output = write(tmp_path / "..", [json.dumps(good).encode(), bad[0]])
    with pytest.raises(BatchError, match="line 2: not JSON"):
        run(llm, source, output, on_error="stop")
    assert not [line for line in output.read_text().splitlines() if json.loads(line)["error"]]


def test_an_output_is_never_mixed_up_with_another(llm, tmp_path):
    source, output = write(tmp_path, mixed(12))
    run(llm, source, output)
    before = output.read_bytes()
    for change in ({"seed": 1}, {"shard": (1, 2)}):
        with pytest.raises(BatchError, match="another .*" + next(iter(change))):
            run(llm, source, output, **change)
    with LLM(max_context=256, exact=False) as fast, pytest.raises(BatchError, match="another model"):
        run(fast, source, output)
    there = Manifest.read(tmp_path / "out.manifest.json")
    with Journal(output, there.run), pytest.raises(BatchError, match="another process"):
        run(llm, source, output)
    write(tmp_path, mixed(18))
    with pytest.raises(BatchError, match="input_sha256"):
        run(llm, source, output)
    (tmp_path / "out.manifest.json").unlink()
    with pytest.raises(BatchError, match="without a manifest"):
        run(llm, source, output)
    assert output.read_bytes() == before
    with pytest.raises(BatchError, match="cannot be read"):
        run(llm, tmp_path / "missing.jsonl", output)
    with pytest.raises(BatchError, match="expected a file"):
        run(llm, "/dev/null", output)
    with pytest.raises(BatchError, match="cannot be written"):
        run(llm, source, tmp_path / "no" / "folder.jsonl")


def stop_after(n_steps):
    """Progress that interrupts a run."""
    left = [n_steps]

    def show(_):
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signal.SIGINT)

    return show


def test_a_journal_that_was_left_is_never_taken_for_another_run(llm, tmp_path):
    source, output = write(tmp_path, mixed(30))
    pending = tmp_path / "out.pending"
    for n_steps in range(4, 40):
        run(llm, source, output, progress=stop_after(n_steps))
        if pending.exists():
            break
        for path in tmp_path.glob("out.*"):
            path.unlink()
    kept = pending.read_bytes()
    output.unlink()
    for gone in ((), ("out.manifest.json",)):
        for name in gone:
            (tmp_path / name).unlink()
        with pytest.raises(BatchError, match=r"out\.pending"):
            run(llm, source, output, seed=1)
        assert pending.read_bytes() == kept
    (tmp_path / "out.jsonl").unlink(missing_ok=True)
    pending.unlink()
    assert run(llm, source, output, seed=1).found == 0
    assert verify(tmp_path / "out.manifest.json", llm=llm, sample=None).differing == []


def test_outputs_of_one_folder_keep_apart(llm, tmp_path):
    source, _ = write(tmp_path, mixed(9))
    names = ("r", "r.1", "r.2", "r.json", "r.jsonl.gz")
    for i, name in enumerate(names):
        assert run(llm, source, tmp_path / name, seed=i).complete
    for i, name in enumerate(names):
        assert run(llm, source, tmp_path / name, seed=i).found == 9


def test_a_run_without_results_binds_nobody(llm, tmp_path):
    lines = mixed(5)
    source, output = write(tmp_path, [*lines, b"{]"])
    with pytest.raises(InvalidRequestError, match="YYYY-MM-DD"):
        run(llm, source, output, date="29-02-2024")
    with pytest.raises(BatchError, match="not JSON"):
        run(llm, source, output, on_error="stop", date="2024-02-29")
    write(tmp_path, lines)
    assert run(llm, source, output, date="2024-03-01").complete
    assert Manifest.read(tmp_path / "out.manifest.json").depends_on["date"] == "2024-03-01"


def test_a_model_is_also_its_tokenizer_and_template(llm, tmp_path):
    """The same weights with another template, or with other flags, give other answers."""
    found = []
    for change in ({}, {}, {"chat_template": TEMPLATE}, {"ggml__add_bos_token": False}):
        path = rewrite(llm.path, tmp_path / "same.gguf", gguf.GGMLQuantizationType.F32, **change)
        with LLM(path, max_context=256) as same:
            found.append(facts(same))
    assert found[0] == found[1]
    assert len({f.pop("tokenizer") for f in found}) == 3
    assert found[0] == found[2] == found[3]


def test_verify_finds_a_changed_bit(llm, whole, tmp_path):
    source, output = write(tmp_path, mixed(60))
    run(llm, source, output)
    manifest = tmp_path / "out.manifest.json"
    found = verify(manifest, llm=llm, sample=None)
    assert (found.n_results, found.n_checked, found.differing, found.changed) == (60, 60, [], [])
    lines = output.read_bytes().splitlines(keepends=True)
    lines[6] = lines[6].replace(b'"token_logprobs": [-', b'"token_logprobs": [-1', 1)
    output.write_bytes(b"".join(lines))
    assert verify(manifest, llm=llm, sample=None).differing == [7]
    assert verify(manifest, sample=5).n_checked == 5
    with LLM(max_context=256, exact=False) as fast, pytest.raises(BatchError, match="model"):
        verify(manifest, llm=fast)
    source.write_bytes(b"{}\n")
    with pytest.raises(BatchError, match="input_sha256"):
        verify(manifest, llm=llm)
    with pytest.raises(BatchError, match="manifest"):
        verify(source, llm=llm)
    with pytest.raises(InvalidRequestError, match="sample 0"):
        verify(manifest, llm=llm, sample=0)


def test_verify_refuses_what_it_cannot_judge(llm, tmp_path):
    source, output = write(tmp_path, mixed(6))
    run(llm, source, output)
    output.write_bytes(output.read_bytes() + b"{}\n")
    with pytest.raises(BatchError, match="7 results, and there are 6 requests"):
        verify(tmp_path / "out.manifest.json", llm=llm)
    path = tmp_path / "out.manifest.json"
    path.write_text(path.read_text().replace('"exact": true', '"exact": false'))
    with pytest.raises(BatchError, match="fast mode"):
        verify(path, llm=llm)


def test_of_texts_that_do_not_all_fit_none_stays_in_the_engine(llm, tmp_path):
    source, output = write(tmp_path, [json.dumps({"id": 1, "input": ["Once", "One " * 600]}).encode()])
    before = llm.metrics().computed_tokens
    assert run(llm, source, output).failed == 1
    after = llm.metrics()
    assert after.running == after.waiting == 0 and after.computed_tokens == before


def test_a_run_has_one_date(llm, tmp_path):
    """Templates that print today's date print that of the run's beginning, also when it goes on another day."""
    template = "{{ strftime_now('%d %m %Y') }}" + TEMPLATE
    ask = {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 3,
        "chat_template": template,
        "seed": 1,
        "logprobs": True,
    }
    dated = ask | {"chat_template_kwargs": {"date": "2025-12-24"}}
    lines = [json.dumps({"id": i, **body}).encode() for i, body in enumerate((ask, dated, ask))]
    source, output = write(tmp_path, lines)
    run(llm, source, output, date="2024-02-29")
    calm = output.read_bytes()
    expected = llm.chat("Hi", SamplingParams(max_tokens=3, seed=1), template=template, date=datetime(2024, 2, 29))
    found = bodies(output)
    assert found["0"] == found["2"] != found["1"]
    assert found["0"]["usage"]["prompt_tokens"] == len(expected.results[0].prompt_token_ids)
    assert found["0"]["choices"][0]["token_ids"] == expected.results[0].token_ids
    output.write_bytes(calm.splitlines(keepends=True)[0])
    assert run(llm, source, output).found == 1
    assert output.read_bytes() == calm
    assert verify(tmp_path / "out.manifest.json", llm=llm).differing == []
    with pytest.raises(BatchError, match="another date"):
        run(llm, source, output, date="2024-03-01")
    with pytest.raises(InvalidRequestError, match="YYYY-MM-DD"):
        run(llm, source, tmp_path / "other.jsonl", date="tomorrow")


def test_an_encoder_embeds_files(data, tmp_path):
    texts = [f"text number {i} " * (1 + i % 5) for i in range(70)]
    lines = [json.dumps({"id": i, "input": t, "pooling": "mean", "truncate": 9}).encode() for i, t in enumerate(texts)]
    source, output = write(tmp_path, [*lines, b'{"id": "x", "prompt": "x"}'])
    with LLM(data / "models" / "all-MiniLM-L6-v2") as llm:
        assert run(llm, source, output).failed == 1
        got = [b["data"][0]["embedding"] for b in bodies(output).values() if b]
        np.testing.assert_array_equal(np.array(got, np.float32), llm.embed(texts, truncate=9))
        assert verify(tmp_path / "out.manifest.json", llm=llm).differing == []


def test_openais_fields_mean_what_they_say():
    def params(**body):
        return params_of(body, 5)

    assert params() == SamplingParams(seed=5)
    assert params(seed=3, max_completion_tokens=7, stop=["x"]) == SamplingParams(seed=3, max_tokens=7, stop=("x",))
    assert params(logit_bias={"5": -2}) == SamplingParams(seed=5, logit_bias={5: -2.0})
    assert params(logprobs=3).logprobs == 3 and params(logprobs=True, top_logprobs=2).logprobs == 2
    assert params(logprobs=True).logprobs == params(logprobs=False).logprobs == 0
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert params(response_format=form).grammar == Grammar.json_schema(schema)
    assert params(response_format={"type": "text"}).grammar is None
    assert params(grammar={"choice": ["a", "b"]}).grammar == Grammar.choice(["a", "b"])
    assert params(top_k=4, min_p=0.1, model="m", user="u", stream=False) == SamplingParams(seed=5, top_k=4, min_p=0.1)
    assert params(echo=False, suffix="", parallel_tool_calls=True, service_tier="auto") == SamplingParams(seed=5)
    for bad in (
        {"stream": True},
        {"top_logprobs": 2},
        {"echo": True},
        {"suffix": "x"},
        {"parallel_tool_calls": False},
        {"response_format": {"type": "xml"}},
        {"grammar": {"regex": "a", "choice": ["a"]}},
        {"logit_bias": {"x": 1}},
        {"stop": 5},
        {"temperature": "hot"},
    ):
        with pytest.raises(InvalidRequestError):
            params(**bad)


def test_several_prompts_are_one_request(llm, tmp_path):
    """As many choices for each, in order; with a seed each prompt is what it is alone."""
    ask = {"max_tokens": 3, "n": 2, "logprobs": 2}
    prompts = ["One", [5, 6], "One"]
    lines = [{"id": "all", "prompt": prompts, **ask, "seed": 7}, {"id": "drawn", "prompt": prompts, **ask}]
    lines += [{"id": i, "prompt": p, **ask, "seed": 7} for i, p in enumerate(prompts)]
    lines += [{"id": "bad", "prompt": ["One", [99999]]}, {"id": "long", "prompt": ["One", "One " * 600]}]
    source, output = write(tmp_path, [json.dumps(line).encode() for line in lines])
    assert run(llm, source, output).failed == 2
    found = bodies(output)
    choices = [choice for i in range(3) for choice in found[str(i)]["choices"]]
    assert found["all"]["choices"] == [choice | {"index": i} for i, choice in enumerate(choices)]
    usages = [found[str(i)]["usage"] for i in range(3)]
    assert found["all"]["usage"] == {name: sum(usage[name] for usage in usages) for name in usages[0]}
    assert len({choice["seed"] for choice in found["drawn"]["choices"]}) == 6
    assert llm.metrics().running == llm.metrics().waiting == 0


def test_a_function_can_be_asked_for(llm, tmp_path):
    """`tool_choice` in OpenAI's form, with a template that shows how calls are written."""
    template = (
        "{% for t in tools %}{{ t.function.name }} {% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}\n"
        "{% endfor %}"
    )
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in ("add", "take")]
    base = {"messages": [{"role": "user", "content": "Hi"}], "tools": tools, "chat_template": template}
    wanted = ({"type": "function", "function": {"name": "take"}}, "required", {"type": "function"}, "other", [1])
    lines = [json.dumps({"id": i, **base, "tool_choice": w, "max_tokens": 90}).encode() for i, w in enumerate(wanted)]
    nameless = base | {"tools": [{"type": "function", "function": {"parameters": schema}}], "tool_choice": "required"}
    source, output = write(tmp_path, [*lines, json.dumps({"id": "x", **nameless}).encode()])
    assert run(llm, source, output).failed == 4
    found = bodies(output)
    (call,) = found["0"]["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "take" and json.loads(call["function"]["arguments"])["n"] in (1, 2)
    assert found["1"]["choices"][0]["message"]["tool_calls"]


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


EXTREME = [
    {"prompt": "One", "max_tokens": 3, "top_k": 1, "logprobs": 4, "logprobs_of": "sampling"},
    {"prompt": "One", "max_tokens": 3, "logprobs": 4, "logprobs_of": "sampling", "grammar": {"choice": ["a", "b"]}},
    {"prompt": "One", "max_tokens": 2, "temperature": 10**400},
    {"prompt": "One", "max_tokens": 2, "logit_bias": {"5": 10**400}},
    {"prompt": "One", "max_tokens": 2, "dry_multiplier": 1, "dry_breakers": ["\ud800"]},
    {"prompt": "One", "max_tokens": 2, "stop": ["\ud800"]},
    {"prompt": "\ud800"},
    {"context": "\ud800", "continuation": "x"},
    {"input": ["One", "\ud800"]},
]


def test_no_request_ends_a_run(llm, tmp_path, monkeypatch, caplog):
    """Values that JSON can write and others choke on, depth, and mistakes of ours; a line beside them is answered."""
    deep = b'{"id": "deep", "messages": [{"role": "user", "content": ' + b"[" * 800 + b"]" * 800 + b"}]}"
    good = {"id": "good", "prompt": "One", "max_tokens": 1, "logprobs": 3}
    lines = [json.dumps({"id": i, **body}).encode() for i, body in enumerate(EXTREME)]
    source, output = write(tmp_path, [*lines, deep, json.dumps(good).encode()])
    assert run(llm, source, output).complete
    found = bodies(output)
    assert found["good"] and found["0"] and found["1"] and not found["2"] and not found["deep"]
    assert found["0"]["choices"][0]["logprobs"]["token_logprobs"] == [0.0] * 3
    (top,) = {len(top) for top in found["0"]["choices"][0]["logprobs"]["top_logprobs"]}
    assert top == 1  # nothing else could be chosen

    def broken(*_):
        raise ZeroDivisionError("ours")

    (tmp_path / "out.jsonl").unlink()
    monkeypatch.setattr("oxjax.evaluate.answers.scores", broken)
    source, output = write(tmp_path, mixed(12))
    assert run(llm, source, output).failed == 4
    errors = [json.loads(line)["error"] for line in output.read_text().splitlines()]
    assert [e["code"] for e in errors if e].count("ZeroDivisionError") == 2
    assert caplog.text.count("ZeroDivisionError: ours") == 2


GOOD = {
    "generate": {"prompt": "One"},
    "chat": {"messages": [{"role": "user", "content": "Hi"}], "chat_template": TEMPLATE},
    "embed": {"input": "One"},
    "score": {"context": "One", "continuation": " day"},
}
ODD = [
    None,
    True,
    -1,
    0,
    3,
    1e300,
    -0.5,
    "",
    "x",
    [],
    {},
    [None],
    [[]],
    [{}],
    {"a": [1]},
    [["x"], 1],
    [1, "x"],
    {"type": {}},
]
FIELDS = (
    "prompt messages input context continuation continuations tools tool_choice chat_template chat_template_kwargs",
    "pooling normalize encoding_format truncate logprobs top_logprobs response_format grammar max_completion_tokens",
)


@pytest.mark.parametrize("kind", GOOD)
def test_no_request_is_worse_than_refused(llm, kind):
    preparer = RequestPreparer(llm, 0, "2024-02-29")
    assert preparer.prepare(BatchRequest("x", kind, GOOD[kind])).n_tokens
    messages = [[{"role": "user", "content": odd}] for odd in ODD] + [[{"role": odd}] for odd in ODD]
    messages += [[{"role": "assistant", "tool_calls": odd}] for odd in ODD]
    tools = [[{"type": "function", "function": odd}] for odd in ODD]
    wrong = [(name, odd) for name in " ".join(FIELDS).split() for odd in ODD]
    if kind == "generate":
        wrong += [(name, odd) for name in SamplingParams.__dataclass_fields__ for odd in ODD[::7]]
    wrong += [("messages", odd) for odd in messages] + [("tools", odd) for odd in tools]
    names = ("self", "messages", "params", "tools", "schemas", "tool_choice", "variables", "date", "documents", "")
    wrong += [("chat_template_kwargs", {n: odd}) for n in (*names, "add_generation_prompt") for odd in ("x", 1)]
    for name, odd in wrong:
        with suppress(OxjaxError):
            preparer.prepare(BatchRequest("x", kind, GOOD[kind] | {name: odd}))
