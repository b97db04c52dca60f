"""Outputs and manifests of batch runs: never taken for another run's, and verified to the bit."""

import json
import shutil
import signal
from datetime import datetime
from pathlib import Path

import gguf
import pytest

from oxjax import LLM, SamplingParams
from oxjax.errors import BatchError, InvalidRequestError
from oxjax.evaluate import run, verify
from oxjax.evaluate.journal import Journal
from oxjax.evaluate.manifest import Manifest, facts
from tests.helpers.request_files import TEMPLATE, bodies, mixed, write
from tests.helpers.rewrite import rewrite


@pytest.fixture(scope="module")
def ended(llm, tmp_path_factory):
    """The folder of a run that is over."""
    source, output = write(tmp_path_factory.mktemp("ended"), mixed(12))
    assert run(llm, source, output).complete
    return output.parent


@pytest.fixture
def folder(ended, tmp_path):
    """A copy of it, whose output stays as it is."""
    copy = Path(shutil.copytree(ended, tmp_path / "copy"))
    before = (copy / "out.jsonl").read_bytes()
    yield copy
    assert (copy / "out.jsonl").read_bytes() == before


def refused(llm, folder, message, **options):
    with pytest.raises(BatchError, match=message):
        run(llm, folder / "in.jsonl", folder / "out.jsonl", **options)


@pytest.mark.parametrize("change", [{"seed": 1}, {"shard": (1, 2)}], ids=["seed", "shard"])
def test_a_run_with_other_options_is_another(llm, folder, change):
    refused(llm, folder, "another .*" + next(iter(change)), **change)


def test_a_run_of_another_model_is_another(folder):
    with LLM(max_context=256, exact=False) as fast:
        refused(fast, folder, "another model")


def test_a_run_of_other_requests_is_another(llm, folder):
    write(folder, mixed(18))
    refused(llm, folder, "input_sha256")


def test_an_output_without_a_manifest_may_be_anybodys(llm, folder):
    (folder / "out.manifest.json").unlink()
    refused(llm, folder, "without a manifest")


def test_an_output_has_one_process(llm, folder):
    there = Manifest.read(folder / "out.manifest.json")
    with Journal(folder / "out.jsonl", there.run):
        refused(llm, folder, "another process")


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [
        ("missing.jsonl", "out.jsonl", "cannot be read"),
        ("/dev/null", "out.jsonl", "expected a file"),
        ("in.jsonl", "no/folder.jsonl", "cannot be written"),
    ],
)
def test_paths_that_cannot_be_used_are_refused(llm, folder, source, output, message):
    with pytest.raises(BatchError, match=message):
        run(llm, folder / source, folder / output)


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


def test_verify_finds_a_changed_bit(llm, tmp_path):
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
