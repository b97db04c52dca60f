"""Grammars that mean harm cost neither the process, nor its memory, nor much time."""

import json
import subprocess
import sys
from pathlib import Path

import hostile_grammars

SECONDS = 20  # for any of them on a busy machine; a grammar without limits takes hours


def test_hostile_grammars(data):
    """In a process with little memory: it comes to its end, through all of them."""
    vocab = data / "vocab" / "ggml-vocab-gpt-2.gguf"
    done = subprocess.run(
        [sys.executable, hostile_grammars.__file__, vocab],
        capture_output=True, text=True, check=False, timeout=300, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in rows] == list(hostile_grammars.GRAMMARS), done.stderr[-2000:]
    assert done.returncode == 0
    assert [(name, seconds) for name, seconds, _ in rows if seconds > SECONDS] == []
