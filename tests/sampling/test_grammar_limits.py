"""Grammars that mean harm cost neither the process, nor its memory, nor much time."""

import json
import subprocess
import sys

import pytest

from tests.helpers import hostile_grammars

SECONDS = 20  # for any of them on a busy machine; a grammar without limits takes hours


def follow(data, names: list[str]) -> None:
    """In a process with little memory: it comes to its end, through all of them."""
    command = [sys.executable, hostile_grammars.__file__, data / "vocab" / "ggml-vocab-gpt-2.gguf", *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in rows] == names, done.stderr[-2000:]
    assert done.returncode == 0
    assert [(name, seconds) for name, seconds, _ in rows if seconds > SECONDS] == []


def test_hostile_grammars(data):
    follow(data, [name for name in hostile_grammars.GRAMMARS if name not in hostile_grammars.SLOW])


@pytest.mark.slow
def test_the_slowest(data):
    follow(data, list(hostile_grammars.SLOW))
