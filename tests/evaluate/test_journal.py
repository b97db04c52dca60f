"""Whatever a run is killed at, the next one goes on there, and the file is that of a run that nothing disturbed."""

import random
import resource
import subprocess
import sys
import time

import pytest

from oxjax.errors import BatchError
from oxjax.evaluate import batch, run
from oxjax.evaluate.journal import Journal, _record
from oxjax.evaluate.manifest import Manifest
from tests.helpers.request_files import mixed, write


class Killed(BaseException):
    pass


class Mortal(Journal):
    """A journal whose process ends at a write, of which any number of bytes has come through.

    Attributes:
        left: writes that it survives.
        rng: of how far the last one comes.
        known: places whose results are on the disk, of all runs.
    """

    left, rng, known = 0, random.Random(1), set()

    def add(self, results):
        results = list(results)
        if results:
            if Mortal.left == 0:
                self.die(results)
            Mortal.left -= 1
        Mortal.known |= {place for place, _ in results}
        super().add(results)

    def die(self, results):
        records = [_record(*r) for r in results]
        if not self._journal.tell():
            records[0] = self._head + records[0]
        n = self.rng.randint(0, 2 * sum(map(len, records)))  # half of the time the journal is whole
        self._journal.write(b"".join(records)[:n])
        self._journal.flush()
        for i, (place, _) in enumerate(results):
            if n >= sum(map(len, records[: i + 1])):
                Mortal.known.add(place)
        if n >= sum(map(len, records)):
            waiting, lines, place = self.waiting | dict(results), b"", self.n_written
            while place in waiting:
                lines, place = lines + waiting[place], place + 1
            self._output.write(lines[: self.rng.randint(0, len(lines))])
            self._output.flush()
        raise Killed

    def __exit__(self, kind, *rest):
        if kind is Killed:
            self._close()
        else:
            super().__exit__(kind, *rest)


@pytest.fixture
def ran(monkeypatch):
    """Places of the requests that were run since it was cleared."""
    places, answer = [], batch.answer

    def spy(*args):
        for answers in answer(*args):
            places.extend(a.place for a in answers)
            yield answers

    monkeypatch.setattr(batch, "answer", spy)
    return places


@pytest.mark.parametrize("compact", [1 << 20, 500])
def test_a_crash_at_any_write_loses_nothing_and_redoes_nothing(llm, ran, tmp_path, monkeypatch, compact):
    monkeypatch.setattr("oxjax.evaluate.journal._COMPACT", compact)
    source, calm = write(tmp_path, mixed(42))
    run(llm, source, calm)
    monkeypatch.setattr(batch, "Journal", Mortal)
    for first in (0, 3):
        output = tmp_path / f"{first}.jsonl"
        Mortal.known, n_killed = set(), 0
        while True:
            before, Mortal.left = set(Mortal.known), first + n_killed
            ran.clear()
            try:
                summary = run(llm, source, output)
            except Killed:
                n_killed += 1
                assert not before & set(ran), "a finished request was run again"
                continue
            assert summary.complete and summary.found == len(before) and summary.failed == 7
            assert not before & set(ran)
            break
        assert n_killed > 1
        assert output.read_bytes() == calm.read_bytes()
        assert not output.with_suffix(".pending").exists()


def test_a_full_disk_loses_nothing(llm, ran, tmp_path):
    """Writes that fail half-way: the error is typed, nothing that was kept is run again, the file is the same."""
    source, calm = write(tmp_path, mixed(60))
    run(llm, source, calm)
    expected, output = calm.read_bytes(), tmp_path / "full.jsonl"
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for share in (0.2, 0.5, 0.9):
        before = output.read_bytes().count(b"\n") if output.exists() else 0
        ran.clear()
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(expected)), hard))
        try:
            with pytest.raises(BatchError, match="cannot be written: File too large"):
                run(llm, source, output)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert min(ran) >= before
        assert expected.startswith(output.read_bytes())
    with Journal(output, Manifest.read(tmp_path / "full.manifest.json").run) as journal:
        n_kept = journal.n_written + len(journal.waiting)
    assert n_kept > 30 and run(llm, source, output).found == n_kept
    assert output.read_bytes() == expected


def kill_minus_nine(llm, tmp_path, lines, n_kills, seed):
    """Run the command and kill it at random moments, until it has been killed so often; all files are the same."""
    rng, command = random.Random(seed), [sys.executable, "-m", "oxjax", "batch"]
    source, calm = write(tmp_path, lines)
    run(llm, source, calm)
    expected, output, n_survived = calm.read_bytes(), tmp_path / "killed.jsonl", 0
    for _ in range(n_kills):
        began = output.stat().st_size if output.exists() else 0
        goal = began + rng.random() * (len(expected) - began)  # bytes that are there when it dies
        process = subprocess.Popen([*command, source, output], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (output.stat().st_size if output.exists() else 0) < goal:
            time.sleep(0.001)
        time.sleep(0.02 * rng.random())
        process.kill()
        process.wait()
        if output.exists() and output.stat().st_size == len(expected):
            n_survived += 1
            assert output.read_bytes() == expected
            output.unlink()
            output.with_suffix(".manifest.json").unlink()
    subprocess.run([*command, source, output], check=True, capture_output=True)
    assert output.read_bytes() == expected
    return n_survived


def test_killed_processes_go_on(llm, tmp_path):
    kill_minus_nine(llm, tmp_path, mixed(30), 1, seed=0)


@pytest.mark.slow
def test_twenty_killed_processes_go_on(llm, tmp_path, report):
    n_survived = kill_minus_nine(llm, tmp_path, mixed(2000), 20, seed=1)
    report(f"batch: 20 of 20 killed runs of 2,000 requests end in the same file ({n_survived} after the last byte)")
