"""Stages of the pipeline against llama.cpp's samplers and definitions in float64, on the same logits."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.oracle import require_llama_cpp
from tests.helpers.sampler_cases import STAGE_CASES, agreement, biases, mirostat, penalties, repetitions, stage

ROWS = 1800


def test_penalties():
    # Either side may round a product and the sum it is part of once or twice.
    np.testing.assert_allclose(*penalties(ROWS), rtol=3e-7, atol=1e-6)


def test_biases():
    np.testing.assert_array_equal(*biases(ROWS))


@pytest.mark.parametrize("name", STAGE_CASES)
def test_stages(name):
    got, expected = stage(name, ROWS)
    found = agreement(got, expected, STAGE_CASES[name].rtol)
    # Where a bound is met to the last bit, sums in another order may fall on its other side; and logits of ten thousand
    # round by a thousandth when they are divided.
    assert found.alike >= 0.995
    assert found.worst <= 1e-5
    if name not in ("temperature", "dynamic temperature"):
        assert len({tuple(row) for row in expected > -np.inf}) > ROWS // 5


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat(version):
    """Who is left after three tokens, each of which moved mu."""
    got, expected = mirostat(version, ROWS)
    # Where a bound is met to the last bit, the other order of sums may fall on its other side, and mu moves with it.
    assert agreement(got, expected).same >= 0.995
    assert len({tuple(row) for row in expected > -np.inf}) > ROWS // 5


def test_repetitions():
    got, expected = repetitions(600)
    assert (expected < 0).any(axis=1).mean() > 0.4
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.slow  # each of its lines has a test of its own
def test_the_report():
    require_llama_cpp()
    root = Path(__file__).parents[2]
    command = [sys.executable, root / "tools" / "sampler_parity.py", "--vectors", "90"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" | ")[0] for line in done.stdout.splitlines()]
    assert {f"| {name}" for name in (*STAGE_CASES, "DRY", "grammar", "mirostat 2")} <= set(lines)
