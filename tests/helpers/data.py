"""Real model files: the folder that `OXJAX_TEST_DATA` names, or `../shared/data`."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("OXJAX_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def data_files(pattern: str) -> list:
    """Parameters for `pytest.mark.parametrize`: one per data file, or one that the `data` fixture skips."""
    found = sorted(DATA.glob(pattern))
    return [pytest.param(p, id=p.stem) for p in found] or [pytest.param(DATA, id="no-data")]
