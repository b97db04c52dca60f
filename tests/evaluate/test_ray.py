"""A pool of actors writes what one process writes, to the byte, whatever dies meanwhile."""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from oxjax import LLM
from oxjax.errors import BatchError, GGUFError
from oxjax.evaluate import run
from tests.helpers.extras import require
from tests.helpers.request_files import mixed, write

pytestmark = [
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\."),  # Ray's use of itself
    pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning"),  # to start what is executed at once
]
# A number of the wrong type would be refused in other words here, where the types of all arguments are checked.
LINES = [line.replace(b'"top_p": 7', b'"top_p": 7.0') for line in mixed(31)]
OPTIONS = {"max_batch": 4, "max_context": 256}


@pytest.fixture(scope="module")
def pool():
    """The module under test, with a cluster of two processors."""
    require("ray", "ray")
    import ray

    from oxjax.evaluate import ray as pool

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)  # of the actors
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # else other tests leave actors next to nothing of two processors
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 << 20,
            log_to_driver=False,
            logging_level="ERROR",
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield pool
        ray.shutdown()


@pytest.fixture(scope="module")
def llm():
    with LLM(**OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def whole(llm, tmp_path_factory):
    """Files of a run in one process."""
    source, output = write(tmp_path_factory.mktemp("whole"), LINES)
    run(llm, source, output)
    return output


def manifest(output):
    return output.with_suffix(".manifest.json")


def fragile(answers, flag):
    """Answers whose process dies once, when a block is done and not yet handed back."""

    class Fragile(answers):
        def __call__(self, table):
            found = super().__call__(table)
            if table["place"][0].as_py() == 10 and not flag.exists():
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return found

    return Fragile


def test_actors_write_what_one_process_writes(pool, whole, tmp_path, monkeypatch):
    flag, whole_map = tmp_path / "died", pool._map
    monkeypatch.setattr(pool, "_map", lambda data, answers, *rest: whole_map(data, fragile(answers, flag), *rest))
    source, output = write(tmp_path, LINES)
    seen = []
    summary = pool.run(source, output, actors=2, block=5, progress=seen.append, **OPTIONS)
    assert flag.exists()
    assert (summary.total, summary.done, summary.failed, summary.found) == (31, 31, 5, 0)
    assert len(seen) == 7 and seen[-1].done == 31
    assert output.read_bytes() == whole.read_bytes()
    assert manifest(output).read_bytes() == manifest(whole).read_bytes()


def test_what_was_written_is_not_computed_again(pool, llm, whole, tmp_path):
    source, output = write(tmp_path, LINES)
    seen = []

    def stop(progress):
        seen.append(progress)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.run(source, output, actors=1, block=5, progress=stop, **OPTIONS)
    summary = run(llm, source, output)
    assert summary.complete and 10 <= summary.found == seen[-1].done < 31
    assert output.read_bytes() == whole.read_bytes()


def test_datasets_have_the_same_answers(pool, whole):
    import ray

    lines = LINES[:12]
    texts = ray.data.from_items([{"n": i, "request": line.decode()} for i, line in enumerate(lines)] + [{"n": 12}])
    rows = pool.map_requests(texts, actors=1, block=5, **OPTIONS).take_all()
    *rows, empty = sorted(rows, key=lambda row: row["n"])
    assert "not JSON" in json.loads(empty["answer"])["error"]["message"]
    for row, line in zip(rows, whole.read_text().splitlines()[:12], strict=True):
        answer, expected = json.loads(row["answer"]), json.loads(line)
        if expected["error"]:
            expected["error"]["line"] = None
        assert (row["request"].encode(), answer) == (lines[row["n"]], expected)


def test_engines_that_would_answer_otherwise_are_refused(pool, tmp_path):
    import ray

    def refused():
        try:
            pool.FileAnswers(None, OPTIONS, 0, "2024-02-29", {"software": {"jax": "0.1"}})
        except BatchError as error:
            return str(error), os.environ["PJRT_NPROC"]

    message, threads = ray.get(ray.remote(num_cpus=1, max_calls=1)(refused).remote())
    assert "would give other results: software" in message and threads == "1"
    source, output = write(tmp_path, mixed(6))
    with pytest.raises(GGUFError, match="missing") as caught:  # of another process
        pool.run(source, output, "missing.gguf", actors=1)
    assert caught.value.path == "missing.gguf"
    with pytest.raises(BatchError, match="at least 1"):
        pool.run(source, output, actors=2, block=0)
    assert not output.exists()


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "oxjax.evaluate.ray", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BatchError, match=r"oxjax\[ray\]"):
        importlib.import_module("oxjax.evaluate.ray")
