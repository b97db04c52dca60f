"""Shared fixtures: where the real files are, and the run-time checks that only tests pay for."""

import os
import resource
import time
from collections import Counter
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

# Tests check every annotated function of the modules that use jaxtyping against their shapes. Elsewhere types are
# pyright's: a tokenizer calls small functions a million times, and checks would take two thirds of its tests' time.
ROOT = Path(__file__).parents[1]
SHAPED = [path for path in (ROOT / "oxjax").rglob("*.py") if "from jaxtyping import" in path.read_text("utf-8")]
_hook = install_import_hook(
    [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SHAPED], "beartype.beartype"
)
jax.config.update("jax_numpy_dtype_promotion", "strict")

from oxjax.kernels import native  # noqa: E402  (the hook comes first)
from oxjax.kernels.numerics import BACKENDS, Numerics  # noqa: E402
from tests.helpers.data import DATA  # noqa: E402


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real model files; absent in a bare clone, required in CI."""
    if not DATA.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"test data missing at {DATA}: CI must run the data tests")
        pytest.skip(f"no test data at {DATA} (set OXJAX_TEST_DATA)")
    return DATA


MANY_MAPS = 20_000  # of 65,530; a compiled program takes some


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Both backends of an operation."""
    if request.param == "native" and native.kernels() is None:
        pytest.skip(native.describe())
    return request.param


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Drop compiled programs after a file, before the process has as many memory maps as Linux gives one."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > MANY_MAPS:
        jax.clear_caches()


@pytest.fixture
def numerics(backend):
    """Exact ones of both backends."""
    return Numerics(backend=backend)


# Run by `pytest -m quick`: something of every room that compiles nothing, and one request to the embedded model.
QUICK = (
    "tests/cache/test_allocator.py",
    "tests/cache/test_prefix.py::test_a_long_random_run_agrees_with_the_model[0]",
    "tests/cache/test_states.py",
    "tests/chat/test_parser.py",
    "tests/chat/test_tools.py",
    "tests/engine/test_scheduler.py",
    "tests/gguf/test_gguf_hostile.py::test_each_lie_is_named",
    "tests/gguf/test_gguf_quants.py",
    "tests/gguf/test_gguf_reader.py::test_written_files_read_back",
    "tests/gguf/test_gguf_splits.py",
    "tests/models/test_architectures.py",
    "tests/sampling/test_grammar.py",
    "tests/sampling/test_params.py",
    "tests/test_cli.py::test_generate_prints_a_story",
    "tests/test_docstrings.py",
    "tests/test_errors.py",
    "tests/test_hub.py",
    "tests/test_public.py",
    "tests/tokenizer/test_tokenizer_data.py::test_agrees_with_llama_cpp[ggml-vocab-gpt-2",
    "tests/tokenizer/test_tokenizer_data.py::test_agrees_with_llama_cpp[ggml-vocab-llama-spm",
    "tests/tokenizer/test_tokenizer_kinds.py",
    "tests/tokenizer/test_vocabulary.py",
)
assert all((ROOT / name.partition("::")[0]).exists() for name in QUICK)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the quick tests, before tests are chosen by their marks."""
    for item in items:
        if item.nodeid.startswith(QUICK) and item.get_closest_marker("slow") is None:
            item.add_marker("quick")


_MEASURED, _PROCESSOR = "measured", "processor seconds"
_report: list[str] = []
_processor_seconds: Counter[str] = Counter()  # by test file
_BEGAN = pytest.StashKey[float]()


@pytest.fixture
def report(record_property):
    """Call it with a line that the run should end with, such as a measured error."""
    return lambda line: record_property(_MEASURED, line)


def pytest_runtest_logreport(report):
    """Properties of tests travel from the workers, which have no terminal."""
    if report.when == "teardown":
        _report.extend(value for name, value in report.user_properties if name == _MEASURED)
        for name, value in report.user_properties:
            if name == _PROCESSOR:
                _processor_seconds[report.nodeid.partition("::")[0]] += value


def _seconds() -> float:
    """Processor time of this process and of those that it waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item):
    item.stash[_BEGAN] = _seconds()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item):
    try:
        return (yield)
    finally:
        if _BEGAN in item.stash:
            item.user_properties.append((_PROCESSOR, _seconds() - item.stash[_BEGAN]))


def pytest_terminal_summary(terminalreporter):
    if _report:
        terminalreporter.section("measured")
        for line in sorted(_report):
            terminalreporter.line(line)
    if len(_processor_seconds) > 1:
        minutes = _processor_seconds.total() / 60
        terminalreporter.section(f"processor seconds of a file; {minutes:.1f} minutes in all")
        for name, seconds in _processor_seconds.most_common():
            terminalreporter.line(f"{seconds:7.1f}  {name}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n`, whole files go to a process, so that module fixtures are made once; in order, short ones last."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)
