"""An output file that loses nothing: at whatever byte a run is killed, the next one goes on there.

Results are done in any order and wanted in one. Each goes to a journal first; those that are next in order are then
appended to the output. A torn end of the output is in the journal whole, and a torn end of the journal was not done.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from oxjax.errors import BatchError

_COMPACT = 1 << 20  # bytes of results that are in the output already, before the journal is written anew


class Journal:
    """An output file and its journal. Use as a context manager; the journal goes when it is closed empty.

    Args:
        output: the file; lines that are there already stay.
        journal: beside it.

    Attributes:
        n_written: results in the output.
        waiting: results that others have to come before, by their place.

    Raises:
        BatchError: another process writes these files, or the journal is of another output.
    """

    def __init__(self, output: Path, journal: Path):
        self._journal_path = journal
        self._journal: BinaryIO = journal.open("a+b")
        if not _lock(self._journal, journal):
            self._journal.close()
            raise BatchError(f"{journal}: another process writes {output}")
        self._output: BinaryIO = output.open("a+b")
        try:
            self.n_written = _complete_lines(self._output)
            self.waiting = {place: line for place, line in _records(self._journal) if place >= self.n_written}
        except BaseException:
            self._close()
            raise
        self._stale = 0
        self._append_next()

    def add(self, results: Iterable[tuple[int, bytes]]) -> None:
        """Take results, places and lines, and keep them whatever happens next."""
        results = list(results)
        for place, line in results:
            self._journal.write(_record(place, line))
            self.waiting[place] = line
        if results:
            _sync(self._journal)
            self._append_next()

    def is_known(self, place: int) -> bool:
        """Whether there is a result for this place."""
        return place < self.n_written or place in self.waiting

    def _append_next(self) -> None:
        before = self.n_written
        while (line := self.waiting.pop(self.n_written, None)) is not None:
            self._output.write(line)
            self.n_written += 1
            self._stale += len(line)
        if self.n_written > before:
            _sync(self._output)
        if not self.waiting:
            self._journal.truncate(0)
            self._stale = 0
        elif self._stale > _COMPACT:
            self._compact()

    def _compact(self) -> None:
        """Write the journal anew, without what is in the output."""
        fresh = self._journal_path.with_name(self._journal_path.name + ".new")
        with fresh.open("wb") as file:
            file.writelines(_record(place, line) for place, line in self.waiting.items())
            _sync(file)
        replacement = fresh.open("a+b")
        fcntl.flock(replacement, fcntl.LOCK_EX)
        os.replace(fresh, self._journal_path)
        self._journal.close()
        self._journal, self._stale = replacement, 0

    def _close(self) -> None:
        self._output.close()
        self._journal.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.waiting:
            self._journal_path.unlink()
        self._close()


def _lock(file: BinaryIO, path: Path) -> bool:
    """Whether the file is ours now, and still the one of this name: who had it before may have put another there."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _complete_lines(file: BinaryIO) -> int:
    """How many lines there are, once a torn one at the end is gone."""
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


def _records(file: BinaryIO) -> Iterable[tuple[int, bytes]]:
    """Places and lines of a journal, up to where it was torn; what follows is cut off."""
    file.seek(0)
    end = 0
    for record in file:
        checksum, _, data = record.partition(b" ")
        place, _, line = data.partition(b" ")
        if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(data):
            break
        end += len(record)
        yield int(place), line
    file.truncate(end)
