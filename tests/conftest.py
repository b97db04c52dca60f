"""Shared fixtures: where the real files are, and the run-time checks that only tests pay for."""

import os
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

# Every annotated function of the package is checked against its jaxtyping shapes in tests.
_hook = install_import_hook("oxjax", "beartype.beartype")
jax.config.update("jax_numpy_dtype_promotion", "strict")

from oxjax.kernels import native  # noqa: E402  (the hook comes first)
from tests.helpers.data import DATA  # noqa: E402


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real model files; absent in a bare clone, required in CI."""
    if not DATA.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"test data missing at {DATA}: CI must run the data tests")
        pytest.skip(f"no test data at {DATA} (set OXJAX_TEST_DATA)")
    return DATA


@pytest.fixture
def without_kernels(monkeypatch):
    """XLA computes everything, as where there is no compiler."""
    monkeypatch.setattr(native, "kernels", lambda: None)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture(params=["native", "xla"])
def form(request):
    """Both forms of an operation."""
    if request.param == "xla":
        request.getfixturevalue("without_kernels")
    elif native.kernels() is None:
        pytest.skip(native.describe())
    return request.param


_MEASURED = "measured"
_report: list[str] = []


@pytest.fixture
def report(record_property):
    """Call it with a line that the run should end with, such as a measured error."""
    return lambda line: record_property(_MEASURED, line)


def pytest_runtest_logreport(report):
    """Properties of tests travel from the workers, which have no terminal."""
    if report.when == "teardown":
        _report.extend(value for name, value in report.user_properties if name == _MEASURED)


def pytest_terminal_summary(terminalreporter):
    if _report:
        terminalreporter.section("measured")
        for line in sorted(_report):
            terminalreporter.line(line)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n`, whole files go to a process, so that module fixtures are made once; in order, short ones last."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)
