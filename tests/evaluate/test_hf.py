"""The same tasks as the harness's own `hf` model answers them, with the same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import pytest

if not os.environ.get("CI"):  # which must have it
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install .[lm-eval])")

import datasets

import oxjax.evaluate.harness  # noqa: F401  (registers the model)
from tests.helpers.lm_eval_tasks import CHAT, evaluate, write_tasks
from tests.helpers.rewrite import rewrite

# Sums of up to 60 log-probabilities in float32, which torch rounds otherwise. Measured: 4e-5.
ATOL = 2e-4
CONVERSATION = {"apply_chat_template": True, "fewshot_as_multiturn": True, "num_fewshot": 2}
RUNS = [
    (["choice", "generate"], {}, {}),
    (["rolling"], {}, {"add_bos_token": False}),  # else `hf` has two in front of a document, and scores the second
    (["rolling"], {"max_length": 24}, {"add_bos_token": False}),
    (["choice"], {"max_length": 14}, {}),
    (["choice", "prefixed"], {}, {}),
]
PEER = """
import json, sys
import torch
from tests.helpers.lm_eval_tasks import evaluate
torch.set_num_threads(1)
tasks, model, options = json.loads(sys.argv[1])
for names, arguments, theirs, more in options:
    _, samples, _ = evaluate(tasks, names, "hf", model_args={**model, **arguments, **theirs}, device="cpu", **more)
    print("samples", json.dumps({n: [[s["arguments"], s["resps"]] for s in found] for n, found in samples.items()}))
"""


def test_hf(data, tmp_path, monkeypatch, report):
    """The interpreter that has torch is this one, or the one that OXJAX_TRANSFORMERS_PYTHON names."""
    python = os.environ.get("OXJAX_TRANSFORMERS_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import lm_eval.models.huggingface"], capture_output=True, check=False).returncode:
        pytest.skip(f"{python} has no transformers for lm_eval")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    tasks = write_tasks(tmp_path, data)
    # Transformers reads no padding token that is outside the vocabulary, and adds no space behind a BOS that is text.
    path = rewrite(
        data / "models" / "stories260K" / "stories260K.gguf",
        tmp_path / "a.gguf",
        gguf.GGMLQuantizationType.F32,
        ggml__padding_token_id=0,
        chat_template=CHAT.removeprefix("{{ bos_token }}"),
    )
    runs = [(*run, CONVERSATION if "prefixed" in run[0] else {}) for run in RUNS]
    model = {"pretrained": str(tmp_path), "gguf_file": path.name, "dtype": "float32"}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [python, "-c", PEER, json.dumps([str(tasks), model, runs])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    printed = [json.loads(line[8:]) for line in done.stdout.splitlines() if line.startswith("samples ")]
    compared = []
    for (names, arguments, _, more), theirs in zip(runs, printed, strict=True):
        _, samples, _ = evaluate(tasks, names, model_args={"model": str(path), **arguments}, **more)
        for name in names:
            for sample, (asked, answers) in zip(samples[name], theirs[name], strict=True):
                assert json.loads(json.dumps(sample["arguments"])) == asked
                compared += [(o, t) for (o,), (t,) in zip(sample["resps"], answers, strict=True)]
    texts = [(ours, answer) for ours, answer in compared if isinstance(ours, str)]
    assert all(ours.removeprefix(" ") == answer for ours, answer in texts)  # theirs is decoded without the prompt
    sums = [(ours, answer) for ours, answer in compared if isinstance(ours, float)]
    pairs = [(ours, answer) for ours, answer in compared if isinstance(ours, tuple)]
    assert (len(texts), len(sums), len(pairs)) == (4, 6, 72)
    assert all(ours[1] == answer[1] for ours, answer in pairs)
    errors = [abs(ours - answer) for ours, answer in sums + [(ours[0], answer[0]) for ours, answer in pairs]]
    assert max(errors) < ATOL
    report(f"log-likelihoods of lm-evaluation-harness's hf model: worst difference {max(errors):.1e}")
