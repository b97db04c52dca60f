"""Lines of a batch file: what their fields mean, and that no line, however odd, ends a run."""

import json
from contextlib import suppress

import pytest

from oxjax import Grammar, SamplingParams
from oxjax.errors import BatchError, InvalidRequestError, OxjaxError
from oxjax.evaluate import run
from oxjax.evaluate.prepare import RequestPreparer
from oxjax.evaluate.request_format import BatchRequest, params_of
from tests.helpers.request_files import TEMPLATE, bodies, mixed, write


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


@pytest.mark.parametrize(
    "body",
    [
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
    ],
    ids=str,
)
def test_fields_that_cannot_be_honoured_are_refused(body):
    with pytest.raises(InvalidRequestError):
        params_of(body, 5)


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


def test_of_texts_that_do_not_all_fit_none_stays_in_the_engine(llm, tmp_path):
    source, output = write(tmp_path, [json.dumps({"id": 1, "input": ["Once", "One " * 600]}).encode()])
    before = llm.metrics().computed_tokens
    assert run(llm, source, output).failed == 1
    after = llm.metrics()
    assert after.running == after.waiting == 0 and after.computed_tokens == before


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
