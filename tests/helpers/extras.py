"""Packages that only some tests need."""

import importlib.util
import os

import pytest


def require(module: str, extra: str) -> None:
    """Skip a test without a package of an extra; fail in CI, which must have it."""
    if importlib.util.find_spec(module) is None:
        if os.environ.get("CI"):
            pytest.fail(f"{module} is missing: CI must run these tests (pip install .[{extra}])")
        pytest.skip(f"{module} is not installed (pip install .[{extra}])")
