"""Journal: crash-safe output file. A run that was killed at any byte is resumed without loss.

Results finish in any order and are written in the order of the requests. Each goes to a journal first; those that are
next in order are then appended to the output. If the last line of the output is incomplete, the journal has it whole;
if the last line of the journal is, that result is computed again. The first line of the journal identifies the run, so
that its results never get into the output of another.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from oxjax.errors import BatchError

_COMPACT = 1 << 20  # bytes of results that are in the output already, before the journal is written anew


class Journal:
    """An output file and its journal, as a context manager; an empty journal is deleted at the end.

    Args:
        output: the file; its lines are kept. The journal is a file beside it.
        run: identifies the run.

    Attributes:
        n_written: number of results in the output.
        waiting: results that wait for earlier ones, by their place.

    Raises:
        BatchError: the files cannot be written, another process writes them, or the journal is of another run.
    """

    def __init__(self, output: Path, run: str):
        self._path, self._journal_path = output, journal_path(output)
        self._head = b"oxjax run %s\n" % run.encode()
        with self._writing(), ExitStack() as opened:
            self._journal: BinaryIO = opened.enter_context(self._journal_path.open("a+b"))
            if not _lock(self._journal, self._journal_path):
                raise BatchError(f"{self._journal_path}: another process writes {output}")
            known = list(_records(self._journal, self._head, self._journal_path))
            self._output: BinaryIO = opened.enter_context(output.open("a+b"))
            self.n_written = _complete_lines(self._output)
            self.waiting = {place: line for place, line in known if place >= self.n_written}
            self._stale = 0
            self._append_next()
            sync_folder(output)
            opened.pop_all()

    def add(self, results: Iterable[tuple[int, bytes]]) -> None:
        """Store results (places and lines) durably.

        Raises:
            BatchError: they cannot be written, for example because the disk is full. The files are as after a crash.
        """
        results = list(results)
        with self._writing():
            if results and not self._journal.tell():
                self._journal.write(self._head)
            for place, line in results:
                self._journal.write(_record(place, line))
                self.waiting[place] = line
            if results:
                _sync(self._journal)
                self._append_next()

    def is_known(self, place: int) -> bool:
        """True if there is a result for this place."""
        return place < self.n_written or place in self.waiting

    def _append_next(self) -> None:
        end = self.n_written
        while (line := self.waiting.get(end)) is not None:
            self._output.write(line)
            end, self._stale = end + 1, self._stale + len(line)
        if end > self.n_written:
            _sync(self._output)
        for place in range(self.n_written, end):
            del self.waiting[place]
        self.n_written = end
        if not self.waiting:
            self._journal.truncate(0)
            self._journal.seek(0)
            self._stale = 0
        elif self._stale > _COMPACT:
            self._compact()

    def _compact(self) -> None:
        """Rewrite the journal without the results that are in the output."""
        fresh = self._journal_path.with_name(self._journal_path.name + ".new")
        with fresh.open("wb") as file:
            file.write(self._head)
            file.writelines(_record(place, line) for place, line in self.waiting.items())
            _sync(file)
        replacement = fresh.open("a+b")
        fcntl.flock(replacement, fcntl.LOCK_EX)
        os.replace(fresh, self._journal_path)
        sync_folder(self._journal_path)
        self._journal.close()
        self._journal, self._stale = replacement, 0

    def _close(self) -> None:
        for file in (self._output, self._journal):
            with suppress(OSError):  # what could not be written before; a file that was is synced
                file.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BatchError(f"{self._path}: cannot be written: {error.strerror}") from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.waiting:
            self._journal_path.unlink()
        self._close()


def beside(output: Path, suffix: str) -> Path:
    """Path with this suffix beside an output; different outputs have different ones."""
    return output.with_name(output.name.removesuffix(".jsonl") + suffix)


def journal_path(output: Path) -> Path:
    """Path of the journal of an output."""
    return beside(output, ".pending")


def sync_folder(path: Path) -> None:
    """Flush the folder of a file to disk, so that new names in it survive a crash."""
    folder = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def has_results(output: Path) -> bool:
    """True if a run has left results in an output or its journal."""
    return any(path.exists() and path.stat().st_size > 0 for path in (output, journal_path(output)))


def _lock(file: BinaryIO, path: Path) -> bool:
    """Lock a file; True if it succeeded and the path still names that file: the last holder may have replaced it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _complete_lines(file: BinaryIO) -> int:
    """Count complete lines, and cut off an incomplete last one."""
    file.seek(0)
    n = end = 0
    for line in file:
        if line.endswith(b"\n"):
            n, end = n + 1, end + len(line)
    file.truncate(end)
    return n


def _record(place: int, line: bytes) -> bytes:
    data = b"%d %s" % (place, line)
    return b"%08x %s" % (zlib.crc32(data), data)


def _records(file: BinaryIO, head: bytes, path: Path) -> Iterable[tuple[int, bytes]]:
    """Read places and lines of a journal, and cut off an incomplete end."""
    file.seek(0)
    found = file.readline()
    if found.endswith(b"\n") and found != head:
        raise BatchError(f"{path}: the results that wait there are of another run: name another output, or delete it")
    end = len(head) if found == head else 0
    for record in file if end else ():
        checksum, _, data = record.partition(b" ")
        place, _, line = data.partition(b" ")
        if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(data):
            break
        end += len(record)
        yield int(place), line
    file.truncate(end)
    file.seek(0, os.SEEK_END)
