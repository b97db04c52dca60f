"""Benchmarks run from end to end, so that they are there when they are needed."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import trace
from tests.helpers.oracle import require_llama_cpp

ROOT = Path(__file__).parents[1]
# Sizes that need few compiled programs.
SMALL = ["--rounds", "2", "--prompts", "32,9000", "--contexts", "16", "--sequences", "2", "--new", "4", "--text", "32"]
SMALL += ["--stream-megabytes", "8", "--product-width", "256", "--weights", "file"]


def run(module: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    require_llama_cpp()
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    done = run("random_model", path, "--shape", "tiny", "--type", "Q4_K_M")
    assert done.returncode == 0, done.stderr
    return path


def compare(model: Path, out: Path, *arguments: str) -> tuple[str, dict]:
    done = run("compare", "--model", model, "--json", out, *SMALL, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def check_lines(found: dict, n_rounds: int) -> None:
    """Every entrant was measured in every round, and the ratios are those of llama.cpp's best settings."""
    for line in found["lines"]:
        costs = {(c["engine"], c["settings"]): c["costs"] for c in line["costs"]}
        assert len(costs) == 5, line["name"]  # oxjax, and llama.cpp in four forms
        assert all(len(rounds) == n_rounds and min(rounds) > 0 for rounds in costs.values())
        (ours,) = (rounds for (engine, _), rounds in costs.items() if engine == "oxjax")
        theirs = min((rounds for (engine, _), rounds in costs.items() if engine == "llama.cpp"), key=sum)
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        expected = [1 / r for r in ratios] if line["unit"] == "MiB" else ratios
        assert line["ratios"]["llama.cpp"] == pytest.approx(expected)


def test_speed_is_compared(model, tmp_path):
    shown, found = compare(model, tmp_path / "out.json", "--only", "prefill,decode,score", "--profile")
    names = ["prefill 32", "decode, 2 sequences after 16", "score 32"]
    assert [line["name"] for line in found["lines"]] == names
    check_lines(found, 2)
    assert all(f"| {name}, tokens/s" in shown for name in names)
    assert "left out: prefill 9000: needs 9001 tokens, the model has a context of 4096" in shown
    assert {"memory", "float"} <= set(found["limits"])
    for line in found["lines"]:
        assert line["reached"][0] in found["limits"] and line["reached"][1] > 0
    for name in names:
        profile = found["profiles"][name]
        parts = [profile[part] for part in ("kernels", "xla", "host")]
        assert sum(parts) == pytest.approx(profile["seconds"]) and all(part >= 0 for part in parts)
        assert profile["xla"] > 0 and profile["top"] and f"{name}: " in shown
        if "integer" in found["limits"]:  # there are native kernels
            assert any(kind == "oxjax_quantized_matmul" for kind, *_ in profile["top"])


def test_time_is_that_of_kernels_xla_or_the_host(tmp_path, monkeypatch):
    """On a CPU, operations can run on another thread, and longer than the span of the program that began them."""
    monkeypatch.setattr(trace, "_kernel_names", lambda: {("step", "custom-call.1"): "oxjax_dot"})

    def span(name, start, end, thread, **args):
        return {"ph": "X", "pid": 1, "tid": thread, "name": name, "ts": start, "dur": end - start, "args": args}

    events = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "/host:CPU"}},
        span("measured", 1e6, 11e6, 0),
        span("ThunkExecutor::Execute", 2e6, 5e6, 1),
        span("add.7", 2e6, 3e6, 1, hlo_op="add.7", hlo_module="step"),
        span("custom-call.1", 4e6, 8e6, 2, hlo_op="custom-call.1", hlo_module="step"),
        span("while.3", 4e6, 9e6, 2, hlo_op="while.3", hlo_module="step"),
        span("add.9", 10e6, 14e6, 2, hlo_op="add.9", hlo_module="step"),  # ends after what is measured
    ]
    (tmp_path / "host.trace.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    found = trace.summary(str(tmp_path))
    assert (found["seconds"], found["kernels"], found["xla"], found["host"]) == (10, 4, 3, 3)
    assert found["top"] == [("add", 5, 2), ("oxjax_dot", 4, 1)]


@pytest.mark.slow
def test_start_up_and_memory_are_compared(model, tmp_path):
    shown, found = compare(model, tmp_path / "out.json", "--only", "start-up,memory")
    assert [line["unit"] for line in found["lines"]] == ["s", "s", "MiB"]
    check_lines(found, 2)
    assert "| start-up, nothing compiled, s" in shown and "| peak memory, prompt of 32, MiB" in shown


@pytest.mark.slow
def test_sampling_is_measured():
    done = run("sampling", "--quick", "--model", ROOT / "oxjax" / "assets" / "demo.gguf")
    assert done.returncode == 0, done.stderr
    names = [line.split(" | ")[0].strip(" |") for line in done.stdout.splitlines()]
    assert all(names.count(name) == 2 for name in ("greedy", "mirostat 1", "grammar mask"))  # alone, beside the model
    assert {"mask, JSON schema", "DRY, a text of 64"} <= set(names)


def test_what_cannot_be_compared_is_refused(tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF and no more")
    done = run("compare", "--model", broken, "--peers", "", *SMALL)
    assert done.returncode == 1 and "broken.gguf" in done.stderr.splitlines()[-1]
    done = run("compare", "--model", broken, "--peers", "other")
    assert done.returncode == 2 and "other is not one of llama.cpp, transformers" in done.stderr


def test_scoring_is_compared(model):
    sizes = ("--items", 3, "--choices", 2, "--context", "5-9", "--continuation", "1-4", "--rounds", 2)
    done = run("score", "--model", model, *sizes)
    assert done.returncode == 0, done.stderr
    assert re.search(r"ratio +\d+\.\d+  \(\d+\.\d+ to \d+\.\d+, 2 rounds\)", done.stdout)
    # Both round activations, in blocks of their own.
    assert float(re.search(r"log-probability (\S+);", done.stdout)[1]) < 0.5


def test_memory_of_scores_is_measured(model):
    done = run("score", "--model", model, "--memory", 64)
    assert done.returncode == 0, done.stderr
    assert re.search(r"score +of 64 tokens: \d+ MiB\nratio \d\.\d+", done.stdout)


@pytest.mark.parametrize(
    ("module", "arguments", "shown"),
    [
        ("host_overhead", ["--running", "2", "--steps", "1,4", "--calls", "2"], "a token"),
        ("allocator", ["--operations", "2000", "--pages", "100,1000"], ""),
        ("quality", ["--formats", "Q8_0", "--stories", "1"], "Q8_0"),
        ("compile_depth", ["--depths", "1,2", "--fast"], "2 layers"),
    ],
    ids=lambda value: value if isinstance(value, str) and value else "",
)
def test_the_smallest_size_runs(module, arguments, shown):
    done = run(module, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and shown in done.stdout
