"""The command as a person runs it; in a process of its own where that matters."""

import json
import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

from oxjax.assets import embedded_model
from oxjax.cli import app, main
from oxjax.errors import OxjaxError


def oxjax(*arguments, check=True, text=None):
    """The command in this process, with `text` as its standard input."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)
    if check and done.exception:
        raise done.exception
    return done


def process(*arguments, **options):
    command = [sys.executable, "-m", "oxjax", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="module")
def stories(data):
    return data / "models" / "stories260K"


def test_generate_prints_a_story_from_the_embedded_model():
    out = oxjax("generate", "--max-tokens", 40, "--seed", 1).stdout
    assert out.startswith("Once upon a time")
    assert len(out.split()) > 15
    assert out == process("generate", "--max-tokens", "40", "--seed", "1").stdout


@pytest.mark.parametrize("case", range(4))
def test_generate_json_matches_llama_cpp(stories, case):
    expected = json.loads((stories / "greedy.json").read_text())[case]
    out = oxjax(
        "generate",
        "-m",
        stories / "stories260K.gguf",
        expected["prompt"],
        *("--max-tokens", len(expected["token_ids"]), "--temperature", 0, "--json"),
    ).stdout
    got = json.loads(out)
    assert {"text", "token_ids", "logprobs", "finish_reason", "seed"} <= got.keys()
    assert got["token_ids"] == expected["token_ids"]
    # Float32 on both sides, log-softmax over 512 tokens; measured below 1e-5.
    np.testing.assert_allclose(got["logprobs"], expected["logprobs"], rtol=0, atol=1e-4)


def test_prompt_from_standard_input_and_stop(stories):
    model = stories / "stories260K.gguf"
    out = oxjax("generate", "-m", model, "-", "-t", 0, "--stop", "Lily", "-n", 60, text="Once upon a time").stdout
    assert out == "Once upon a time, there was a little girl named \n"


def test_chat_one_message_or_a_conversation(tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:")
    options = ("--template", template, "--seed", 1, "-n", 8)
    answer = json.loads(oxjax("chat", "Hello dog", *options, "--json").stdout)
    assert answer["messages"][-1]["content"] == answer["content"]
    assert len(answer["results"]) == 1
    lines = oxjax("chat", *options, "--set", "enable_thinking=false", text="Hello dog\n\nHow?\n").stdout
    assert lines.startswith(answer["content"] + "\n")


def test_info_describes_a_file(data):
    file = data / "quants" / "llama-mix-Q4_K_M.gguf"
    facts = json.loads(oxjax("info", file, "--json").stdout)
    assert facts["architecture"] == "llama"
    assert set(facts["tensors"]) == {"Q4_K", "Q6_K", "F32"}
    assert facts["parameters"] == sum(t["parameters"] for t in facts["tensors"].values())
    assert facts["file_bytes"] == file.stat().st_size
    assert facts["memory"]["parameters_float32"] == 4 * facts["parameters"]
    stored, held = sum(t["bytes"] for t in facts["tensors"].values()), facts["memory"]["parameters"]
    assert stored <= held <= 1.1 * stored if "native" in facts["kernels"] else held == 4 * facts["parameters"]
    assert facts["memory"]["kv_per_token_float32"] > 0
    shown = oxjax("info", file).stdout
    assert "Q4_K" in shown
    assert "kv_per_token" in shown


def test_info_of_an_architecture_that_cannot_run_still_says_what_is_there(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "unheard-of")
    writer.add_token_list(["<s>", "a"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    facts = json.loads(oxjax("info", tmp_path / "m.gguf", "--json").stdout)
    assert facts["architecture"] == "unheard-of"
    assert "unheard-of" in facts["model"]["error"]


def test_tokenize_shows_ids_and_pieces(stories):
    out = json.loads(oxjax("tokenize", "-m", stories / "stories260K.gguf", "Once upon a time", "--json").stdout)
    assert out["token_ids"] == [1, 403, 407, 261, 378]
    assert "".join(out["pieces"][1:]) == " Once upon a time"
    bare = oxjax("tokenize", "-m", stories / "stories260K.gguf", "Once", "--no-special").stdout
    assert bare.split() == ["403", "'", "Once'"]


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["generate", "-m", "no-such.gguf", "x"], "no-such.gguf"),
        (["generate", "x", "--temperature", "-1"], "temperature -1"),
        (["generate", "x", "--max-tokens", "100000"], "the context holds"),
        (["info", "no-such.gguf"], "no-such.gguf"),
        (["generate", "-m", "hf://only/two", "x"], "expected hf://org/repo/file.gguf"),
    ],
)
def test_errors_are_one_line_and_a_code(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["oxjax", *arguments])
    with pytest.raises(SystemExit, match="1"):
        main()
    shown = capsys.readouterr()
    assert message in shown.err
    assert len(shown.err.strip().splitlines()) == 1
    assert shown.out == ""


@pytest.mark.parametrize("arguments", [[], ["--help"], ["generate", "--help"]])
def test_help_is_light(arguments):
    code = f"""
import sys
sys.argv = ["oxjax", *{arguments!r}]
from oxjax.cli import main
try:
    main()
except SystemExit:
    pass
heavy = {{"jax", "numpy", "flax", "tokenizers", "gguf"}} & set(sys.modules)
print(heavy or "light", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "light"
    assert "Usage" in done.stdout


def test_importing_the_package_and_tokenizing_need_no_jax():
    code = """
import sys
import oxjax
assert not {"jax", "numpy"} & set(sys.modules)
from oxjax.tokenizer import Tokenizer
Tokenizer.from_gguf(sys.argv[1]).encode("Once upon a time")
assert "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(embedded_model())], check=True)


def test_embed_prints_a_vector_per_line_of_input(data):
    model = data / "models" / "all-MiniLM-L6-v2"
    cases = json.loads((model / "reference.json").read_text())[:2]
    lines, how = "\n".join(c["text"] for c in cases), ("-m", model, "--weights", "float32")
    found = [json.loads(x) for x in oxjax("embed", *how, "-", "--json", text=lines).stdout.splitlines()]
    assert [f["text"] for f in found] == [c["text"] for c in cases]
    # See tests/test_embed.py.
    np.testing.assert_allclose([f["embedding"] for f in found], [c["embedding"] for c in cases], rtol=0, atol=1.5e-4)
    bare = oxjax("embed", *how, cases[0]["text"]).stdout
    np.testing.assert_allclose([float(x) for x in bare.split()], found[0]["embedding"], rtol=1e-6)
    many = oxjax("embed", *how, "--truncate", 4, "-", text="a panda of China\nthe dog\n\n" * 50).stdout.splitlines()
    assert len(many) == 150
    assert len(set(many)) == 3


def test_embed_names_the_text_that_does_not_fit():
    texts = ["The dog"] * 70 + ["The dog " * 50, "One"]
    done = oxjax("embed", "--max-context", 16, "-", text="\n".join(texts), check=False)
    assert isinstance(done.exception, OxjaxError) and len(done.stdout.splitlines()) == 70
    assert "text 71: 152 tokens" in str(done.exception) and "--truncate" in str(done.exception)
    done = subprocess.run(
        [sys.executable, "-m", "oxjax", "score", "-"],
        input=b"caf\xe9 is not UTF-8",
        capture_output=True,
        check=False,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
    )
    assert done.returncode == 1 and b"lone surrogate" in done.stderr and b"Traceback" not in done.stderr


def test_languages_and_beams(tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["yes", "no"]}')
    given = oxjax("generate", "Say", "--seed", 1, "--json", "--json-schema", schema, "--param", "mirostat=2").stdout
    assert json.loads(json.loads(given)["text"]) in ("yes", "no")
    found = json.loads(oxjax("generate", "Once", "-n", 4, "--beams", 3, "--json", "--param", "min_tokens=2").stdout)
    scores = [result["score"] for result in found["results"]]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    assert oxjax("generate", "Say", "--regex", "a", "--choice", "b", check=False).exit_code == 2
