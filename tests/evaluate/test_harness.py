"""The real harness on a real model: scores against llama.cpp's logits, and requests that do not see each other."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import gguf
import numpy as np
import pytest

if not os.environ.get("CI"):  # which must have it
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install .[lm-eval])")

import datasets
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from lm_eval.models.utils import normalize_gen_kwargs

from oxjax import cli
from oxjax.errors import ChatTemplateError, InvalidRequestError, OxjaxError
from oxjax.evaluate.harness import OxjaxLM
from tests.helpers.lm_eval_tasks import CHAT, CHOICES, TEXTS, evaluate, write_tasks
from tests.helpers.oracle import LlamaCpp
from tests.helpers.rewrite import rewrite

# Sums of up to 60 log-probabilities, from float32 logits on both sides. Measured: 2e-5.
ATOL = 2e-4


@pytest.fixture(scope="module")
def path(data):
    return data / "models" / "stories260K" / "stories260K.gguf"


@pytest.fixture(scope="module")
def lm(path):
    return OxjaxLM(path)


@pytest.fixture(scope="module")
def short(path):
    return OxjaxLM(path, max_length=24)


@pytest.fixture(scope="module")
def oracle(path):
    with LlamaCpp(path, vocab_only=False) as model:
        yield model


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, data):
    return write_tasks(tmp_path_factory.mktemp("tasks"), data)


def instances(kind, *arguments):
    return [Instance(kind, {}, args, i, (None, i, 1)) for i, args in enumerate(arguments)]


def scores(model, ids, n_context):
    """Log-likelihood of what follows the first `n_context` ids, and whether each is the most likely one."""
    logits = model.logits(ids[:-1])[n_context - 1 :].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rest = ids[n_context:]
    return logprobs[np.arange(len(rest)), rest].sum(), (logits.argmax(-1) == rest).all()


def reference(model, context, continuation):
    """The same of texts, tokenised by llama.cpp."""
    stripped = context.rstrip()
    whole, start = model.tokenize(context + continuation), model.tokenize(stripped)
    return scores(model, start + whole[len(start) :], len(start))


def agree(answers, expected):
    for (logprob, is_greedy), (value, greedy) in zip(answers, expected, strict=True):
        assert logprob == pytest.approx(value, rel=0, abs=ATOL)
        assert is_greedy == greedy


def test_multiple_choice(tasks, path, oracle):
    results, samples, config = evaluate(tasks, ["choice"], model_args={"model": str(path)}, batch_size="auto")
    right = []
    for (question, choices, label), sample in zip(CHOICES, samples["choice"], strict=True):
        expected = [reference(oracle, question, f" {choice}") for choice in choices]
        agree([answer[0] for answer in sample["resps"]], expected)
        values = np.array([e[0] for e in expected])
        normed = values / [len(choice) for choice in choices]
        right.append((values.argmax() == label, normed.argmax() == label))
    acc, acc_norm = np.mean(right, axis=0)
    assert 0 < acc < 1
    assert 0 < acc_norm < 1
    assert results["choice"]["acc,none"] == acc
    assert results["choice"]["acc_norm,none"] == acc_norm
    assert config["model_file"] == path.name
    assert config["model_fingerprint"].startswith("llama float32 exact")


def test_perplexity(tasks, path, oracle):
    results, samples, _ = evaluate(tasks, ["rolling"], model_args=f"pretrained={path}")
    expected = [reference(oracle, "", text)[0] for text in TEXTS]
    given = [sample["resps"][0][0] for sample in samples["rolling"]]
    np.testing.assert_allclose(given, expected, rtol=0, atol=ATOL)
    n_words = sum(len(re.split(r"\s+", text)) for text in TEXTS)
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    rolled = results["rolling"]
    assert rolled["word_perplexity,none"] == pytest.approx(np.exp(-sum(expected) / n_words), rel=ATOL)
    assert rolled["byte_perplexity,none"] == pytest.approx(np.exp(-sum(expected) / n_bytes), rel=ATOL)
    assert rolled["bits_per_byte,none"] == pytest.approx(-sum(expected) / n_bytes / np.log(2), rel=ATOL)


def test_generation(tasks, path, data):
    greedy = json.loads((data / "models" / "stories260K" / "greedy.json").read_text())
    results, samples, _ = evaluate(tasks, ["generate"], model_args={"model": str(path)}, batch_size=2)
    given = [sample["resps"][0][0] for sample in samples["generate"]]
    # llama.cpp's texts are of the new ids alone, without the space that joins them to the prompt.
    assert [text.removeprefix(" ") for text in given] == [g["text"].split(".")[0] for g in greedy]
    n_right = sum(text == sample["doc"]["answer"] for text, sample in zip(given, samples["generate"], strict=True))
    assert results["generate"]["exact_match,none"] == n_right / len(greedy)
    assert 0 < n_right < len(greedy)


def test_answers_do_not_depend_on_the_batch(tasks, path, lm):
    """To the last bit."""
    names, seen = ["choice", "rolling"], []
    model = {"model_args": {"model": str(path)}}
    for options in ({"model": lm}, {"batch_size": 1, **model}, {"batch_size": "auto:2", "limit": 8, **model}):
        _, samples, _ = evaluate(tasks, names, **options)
        seen.append([sample["resps"] for name in names for sample in samples[name]])
    assert all(answers == seen[0] for answers in seen)


def test_order(lm):
    pairs = instances("loglikelihood", *((question, f" {c}") for question, choices, _ in CHOICES for c in choices))
    answers = lm.loglikelihood(pairs, disable_tqdm=True)
    assert lm.loglikelihood(pairs[::-1], disable_tqdm=True) == answers[::-1]
    assert [lm.loglikelihood([pair], disable_tqdm=True)[0] for pair in pairs[:3]] == answers[:3]
    texts = instances("loglikelihood_rolling", *((text,) for text in TEXTS))
    assert lm.loglikelihood_rolling(texts[::-1]) == lm.loglikelihood_rolling(texts)[::-1]
    assert lm.loglikelihood([]) == lm.loglikelihood_rolling([]) == lm.generate_until([]) == []


@pytest.mark.parametrize(
    "context,continuation",
    [
        ("Once upon a time", ","),  # one token
        ("Once upon a time", ", there was"),
        ("Once upon a time, ", "there was"),  # the space goes to the continuation
        ("Lily said: \n\n ", '"Hi!"'),
        ("She wen", "t to the park"),  # tokens of the whole text behind those of the context
        ("Once", " upon"),
        ("<s>Once", " upon"),  # one BOS
        ("She ate 漢", "字 🙂"),
    ],
)
def test_pairs(lm, oracle, context, continuation):
    answers = lm.loglikelihood(instances("loglikelihood", (context, continuation)), disable_tqdm=True)
    agree(answers, [reference(oracle, context.removeprefix("<s>"), continuation)])


def test_nothing_before(lm, oracle):
    pairs = instances("loglikelihood", ("", "Once upon"), ("", "<s>Once upon"), ("  ", "Once upon"))
    expected = [scores(oracle, oracle.tokenize(text), 1) for text in ("Once upon", "Once upon", "  Once upon")]
    agree(lm.loglikelihood(pairs, disable_tqdm=True), expected)
    documents = instances("loglikelihood_rolling", ("Once upon",), ("<s>Once upon",), ("",))
    first, second, empty = lm.loglikelihood_rolling(documents, disable_tqdm=True)
    assert first == second == pytest.approx(expected[0][0], abs=ATOL)
    assert empty == 0.0


def test_continuations_without_tokens(lm):
    for pair in (("Once", ""), ("Once upon a t", "ime"), ("", "<s>")):
        with pytest.raises(InvalidRequestError, match="it has no tokens of its own after the context"):
            lm.loglikelihood(instances("loglikelihood", pair), disable_tqdm=True)


def test_long_contexts_lose_their_beginnings(short, oracle, caplog):
    story, end = " ".join(TEXTS[:1] * 3), " She went home."
    pairs = instances("loglikelihood", (story, end), ("Once", " upon"), (story, end))
    answers = short.loglikelihood(pairs, disable_tqdm=True)
    whole, n = oracle.tokenize(story + end), len(oracle.tokenize(story))
    cut = len(whole) - (short.llm.max_context + 1)  # the last token is not an input
    assert cut > 10
    agree(answers[:2], [scores(oracle, whole[cut:], n - cut), reference(oracle, "Once", " upon")])
    assert answers[2] == answers[0]
    assert [r.getMessage() for r in caplog.records] == [
        "2 of 3 requests do not fit in 24 tokens and were cut at the start (see max_length)"
    ]
    before = short.llm.metrics().requests
    with pytest.raises(InvalidRequestError, match=r"request 1: its continuation 'Once .* and 24 fit: raise max"):
        short.loglikelihood(instances("loglikelihood", (story, end), ("Once", story)), disable_tqdm=True)
    assert short.llm.metrics().requests == before  # found before anything is computed


def test_long_documents_are_scored_in_windows(short, oracle):
    """Full windows, and for the last one as much context as there is room for."""
    ids, size = oracle.tokenize(" ".join(TEXTS)), short.llm.max_context
    n = len(ids) - 1
    expected, end = scores(oracle, ids[: size + 1], 1)[0], size
    while end < n:
        new = min(size, n - end)
        end += new
        expected += scores(oracle, ids[end - size : end + 1], size - new + 1)[0]
    assert n > 3 * size
    (answer,) = short.loglikelihood_rolling(instances("loglikelihood_rolling", (" ".join(TEXTS),)), disable_tqdm=True)
    assert answer == pytest.approx(expected, abs=ATOL)


def continued(lm, *arguments):
    return lm.generate_until(instances("generate_until", *arguments), disable_tqdm=True)


def test_until_and_lengths(lm):
    prompt = "Once upon a time"
    story = ", there was a little girl named Lily. She loved to play outside in the park."
    arguments = [
        {"until": ["Lily", "girl"], "max_gen_toks": 64},
        {"until": "Lily"},
        {"until": ["park.", ""], "stop": [" outside"], "max_tokens": 64},
        {"max_new_tokens": 1},
        {"until": None, "max_gen_toks": 5, "max_tokens": 5, "do_sample": False, "temperature": 1},
    ]
    whole = story.split
    assert continued(lm, *((prompt, a) for a in arguments)) == [
        whole("girl")[0],
        whole("Lily")[0],
        whole(" outside")[0],
        ",",
        ", there was a little",
    ]
    assert lm._sampling_params({"until": ["</s>", "<s>", "\n"]}).stop_token_ids == (2, 1)  # which have no text


def test_prompts_leave_room_for_the_answer(short):
    story = TEXTS[0]
    (text,) = continued(short, (story, {"max_gen_toks": 10}))
    ids = short.llm.tokenizer.encode(story)[-14:]
    assert text == short.llm.generate([ids], short._sampling_params({"max_gen_toks": 10}))[0].text
    with pytest.raises(InvalidRequestError, match="24 tokens to generate leave no room for a prompt in 24"):
        continued(short, (story, {"max_gen_toks": 24}))


def test_draws(lm):
    how = {"temperature": 1.5, "max_gen_toks": 12}
    cases = [("Once", how), ("Lily", how), ("Once", how), ("Once", {**how, "seed": 1}), ("Once", {**how, "top_k": 1})]
    texts = continued(lm, *cases)
    assert continued(lm, *cases[::-1]) == [texts[i] for i in (4, 3, 0, 1, 2)]  # the first of two alike gets the seed
    assert len(set(texts)) == len(texts)
    assert texts[4] == continued(lm, ("Once", {"max_gen_toks": 12}))[0]
    assert lm._sampling_params({"do_sample": True}).temperature == 1.0
    assert lm._sampling_params({"temperature": 0.7, "do_sample": False}).temperature == 0.0
    assert lm._sampling_params({"repetition_penalty": 1.2}).penalty_window is None
    assert lm._sampling_params({"repetition_penalty": 1.0}).penalty_window == 64  # as without


def test_of_several_lengths_the_harness_takes_the_same(lm, caplog):
    """As the harness's own models do, which take what a task says and what the command line adds to it."""
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    given = dict(zip(names, (3, "5", 7, 9), strict=True))
    for first in range(len(names)):
        arguments = {name: given[name] for name in reversed(names[first:])}
        expected = normalize_gen_kwargs(arguments)["max_gen_toks"]
        assert lm._sampling_params(arguments).max_tokens == expected == int(given[names[first]])
    assert caplog.text.count("the first one counts") == 3


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"num_beams": 4, "foo": 1}, "generation arguments foo, num_beams: expected some of do_sample"),
        ({"max_gen_toks": "many"}, "expected whole numbers"),
        ({"do_sample": True, "top_p": 2.0}, "top_p 2.0"),
        ({"do_sample": True, "seed": -1}, "seed -1"),
    ],
)
def test_generation_arguments_that_mean_nothing(lm, arguments, message):
    with pytest.raises(InvalidRequestError, match=message):
        continued(lm, ("Once", arguments))


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"foo": 1, "max_batch": 2}, "model arguments foo: expected some of activations, batch_size"),
        ({"max_length": 8, "max_context": 8}, "max_length and max_context are the same: give one"),
        ({"model": "a", "pretrained": "b"}, "model and pretrained are the same: give one"),
        ({"batch_size": "many"}, "batch_size 'many': expected a number, 'auto' or 'auto:N'"),
        ({"device": "hal"}, "device 'hal': jax runs on"),
    ],
)
def test_model_arguments_that_mean_nothing(arguments, message):
    with pytest.raises(InvalidRequestError, match=message):
        OxjaxLM(**arguments)


def test_model_arguments(path):
    text = f"model={path},exact=false,weights=float32,max_length=100,max_gen_toks=7"
    lm = OxjaxLM.create_from_arg_string(text, {"batch_size": "auto", "max_batch_size": 5, "device": "cuda:0"})
    assert (lm.llm.max_context, lm.max_gen_toks, lm.llm.max_batch, lm.llm.config.numerics.exact) == (100, 7, 5, False)
    assert (lm.rank, lm.world_size) == (0, 1)
    assert OxjaxLM(max_batch=3, batch_size=1).llm.max_batch == 3  # the embedded model; the harness says 1 by default


def test_kept_answers_are_used(tasks, path, tmp_path, monkeypatch):
    names = ["choice", "rolling", "generate"]
    options = {"model_args": {"model": str(path)}, "use_cache": str(tmp_path / "answers")}
    first = evaluate(tasks, names, **options)
    monkeypatch.setattr("oxjax.llm.LLM.score", None)
    monkeypatch.setattr("oxjax.llm.LLM.generate", None)
    assert evaluate(tasks, names, **options)[:2] == first[:2]


@pytest.fixture(scope="module")
def narrow(path):
    """Two requests at a time, so that some are done before others begin."""
    return OxjaxLM(path, max_length=24, batch_size=2)


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_what_is_answered_is_kept_when_a_run_ends_early(narrow, tmp_path, monkeypatch, kind):
    """By the harness's own cache: answers are there as they come, and only the rest is computed the next time."""
    texts = [f"Once upon a time, {word}" for word in ("a dog", "Lily", "the sun", "a red ball", "Tom", "she", "he")]
    arguments = {
        "loglikelihood": [(text, " ran home.") for text in texts],
        "loglikelihood_rolling": [(text * 3,) for text in texts],
        "generate_until": [(text, {"max_gen_toks": 2 + i}) for i, text in enumerate(texts)],
    }[kind]
    lm = narrow
    requests, answer, step = instances(kind, *arguments), getattr(lm, kind), lm.llm.engine.step
    expected = answer(requests)
    monkeypatch.setattr(lm, "cache_hook", lm.cache_hook)
    cached = CachingLM(lm, str(tmp_path / "answers.db"))

    def interrupted():
        if len(cached.dbdict) > 0:
            raise KeyboardInterrupt
        step()

    with monkeypatch.context() as patch:
        patch.setattr(lm.llm.engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            getattr(cached, kind)(requests)
    n_kept = len(cached.dbdict)
    assert 0 < n_kept < len(texts)
    asked = []
    monkeypatch.setattr(lm, kind, lambda rest: asked.extend(rest) or answer(rest))
    assert getattr(cached, kind)(requests) == expected
    assert len(asked) == len(texts) - n_kept and len(cached.dbdict) == len(texts)


@pytest.fixture(scope="module")
def talker(path, tmp_path_factory):
    """The same model with a chat template, in a file that wants an EOS after texts."""
    target = tmp_path_factory.mktemp("models") / "talker.gguf"
    changes = {"chat_template": CHAT, "ggml__add_eos_token": True}
    return rewrite(path, target, gguf.GGMLQuantizationType.F32, **changes)


def test_conversations(tasks, talker, oracle):
    _, samples, _ = evaluate(
        tasks,
        ["choice", "prefixed"],
        model_args={"model": str(talker)},
        num_fewshot=1,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        system_instruction="Be kind.",
    )
    shot = "<s>system: Be kind.\nuser: {}\nassistant: {}\nuser: {}\nassistant:"
    question, choices, label = CHOICES[0]
    for (asked, options, _), sample in zip(CHOICES[1:], samples["choice"][1:], strict=True):
        prompt = shot.format(question, choices[label], asked)
        assert sample["arguments"] == [(prompt, option) for option in options]  # the harness puts no space there
        expected = [reference(oracle, prompt.removeprefix("<s>"), option) for option in options]
        agree([answer[0] for answer in sample["resps"]], expected)
    prompts = [sample["arguments"][0][0] for sample in samples["prefixed"]]
    assert all(p.startswith("<s>system: Be kind.\nuser: ") and p.endswith("\nassistant: I say") for p in prompts)


def test_templates(path, talker):
    lm, other = OxjaxLM(talker), OxjaxLM(talker, enable_thinking=False)
    assert lm.chat_template(True) == lm.chat_template("default") == CHAT
    assert lm.chat_template(False) is None
    with pytest.raises(ChatTemplateError, match="only 'default'"):
        lm.chat_template("tool_use")
    assert re.fullmatch(r"talker\.gguf-\w{16}", lm.tokenizer_name)
    assert lm.tokenizer_name != other.tokenizer_name
    with pytest.raises(ChatTemplateError, match="no chat template"):
        OxjaxLM(path).apply_chat_template([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("said", ["I say", "Here:\n```python\n", "x ", ""])
@pytest.mark.parametrize("trims", [False, True])
def test_an_answer_that_is_to_go_on_ends_as_transformers_has_it(path, tmp_path, said, trims):
    """Where the template trims what is said, what comes before the answer's rest is trimmed; else it is kept."""
    source = "{% for m in messages %}[{{ m.content" + (" | trim" if trims else "") + " }}]{% endfor %}"
    lm = OxjaxLM(rewrite(path, tmp_path / "a.gguf", gguf.GGMLQuantizationType.F32, chat_template=source))
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}]
    found = lm.apply_chat_template(history, add_generation_prompt=False)
    assert found == "[Hi][" + (said.rstrip() if trims else said)


def test_templates_tell_one_date(path, tmp_path):
    source = "{{ strftime_now('%d.%m.%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    dated = rewrite(path, tmp_path / "a.gguf", gguf.GGMLQuantizationType.F32, chat_template=source)
    lm, other = OxjaxLM(dated, date="2024-02-29"), OxjaxLM(dated, date="2024-03-01")
    user = [{"role": "user", "content": "Hi"}]
    assert lm.apply_chat_template(user) == "29.02.2024Hi" and other.apply_chat_template(user) == "01.03.2024Hi"
    assert lm.tokenizer_name != other.tokenizer_name  # which names what the harness may keep
    assert lm.get_model_info()["date"] == "2024-02-29"
    with pytest.raises(InvalidRequestError, match="YYYY-MM-DD"):
        OxjaxLM(dated, date="today")


def test_a_template_that_refuses_system_messages(path, tmp_path, caplog):
    source = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No!') }}{% endif %}{{ m.content }}"
    source += "|{% endfor %}{{ enable_thinking }}"
    changed = rewrite(path, tmp_path / "a.gguf", gguf.GGMLQuantizationType.F32, chat_template=source)
    lm, user = OxjaxLM(changed, enable_thinking=True), {"role": "user", "content": "Hi"}
    assert lm.apply_chat_template([{"role": "system", "content": "Be kind."}, user]) == "Hi|True"
    assert "without its system messages: chat template 'default', line 1: No!" in caplog.text
    assert lm.apply_chat_template([user, user], add_generation_prompt=False) == "Hi|Hi"


def test_the_command(tasks, path, tmp_path):
    command = [sys.executable, "-m", "oxjax", "lm-eval", "--model", "oxjax", "--model_args", f"model={path}"]
    more = ["--tasks", "oxjax_choice", "--include_path", tasks, "--batch_size", "auto", "--output_path", tmp_path]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run([*command, *map(str, more)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    acc = next(float(row[6]) for row in rows if "acc" in row)
    (written,) = tmp_path.rglob("results_*.json")
    found = json.loads(written.read_text())
    assert round(found["results"]["oxjax_choice"]["acc,none"], 4) == acc
    assert found["config"]["model_file"] == path.name


def test_the_command_without_the_harness(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(sys, "argv", ["oxjax", "lm-eval", "--model", "oxjax"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == ("oxjax: lm-evaluation-harness is not installed: pip install 'oxjax[lm-eval]'\n")
    assert issubclass(InvalidRequestError, OxjaxError)


def test_the_entry_point():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lm_eval.models"] == {"oxjax": f"{OxjaxLM.__module__}:{OxjaxLM.__name__}"}
    assert get_model("oxjax") is OxjaxLM
