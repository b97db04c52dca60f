"""Request file: its lines, those of a shard, and those that repeat an id."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from hashlib import blake2b, sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from oxjax.errors import BatchError, InvalidRequestError
from oxjax.evaluate.request_format import read_id


class Line(NamedTuple):
    """A line of a request file.

    Attributes:
        place: index among the requests of the shard, from 0.
        number: line number in the file, from 1; None without a file.
        text: the line.
        repeats: an earlier line has the same id.
    """

    place: int
    number: int | None
    text: bytes
    repeats: bool


class Source:
    """A request file, indexed in one pass; its lines are not kept in memory.

    Args:
        path: JSON lines; blank lines are skipped.
        shard: (i, n): the i-th of n parts, from 1. The part of a request depends on its id alone.

    Attributes:
        digest: SHA-256 of the file.

    Raises:
        BatchError: the file does not exist or can be read only once, or the shard is out of range.
    """

    def __init__(self, path: Path, shard: tuple[int, int] = (1, 1)):
        i, n = shard
        if not 1 <= i <= n:
            raise BatchError(f"shard {i}/{n}: expected i from 1 to n")
        if path.exists() and not path.is_file():
            raise BatchError(f"{path}: expected a file, which can be read again to go on")
        self.path = path
        starts, numbers, ids = array("q"), array("q"), bytearray()
        digest, offset = sha256(), 0
        for number, line in enumerate(self._lines(), 1):
            digest.update(line)
            if line.strip():
                name = _name(line)
                ids += name
                mine = int.from_bytes(name, "little") % n == i - 1
                starts.append(offset)
                numbers.append(number if mine else -number)
            offset += len(line)
        self.digest = digest.hexdigest()
        names = np.frombuffer(bytes(ids), np.uint64).reshape(-1, 2)
        repeats = np.ones(len(names), bool)
        repeats[np.unique(names, axis=0, return_index=True)[1]] = False
        found = np.array(numbers, np.int64)
        self._starts, self._numbers = np.array(starts, np.int64)[found > 0], found[found > 0]
        self._repeats = repeats[found > 0]

    def __len__(self) -> int:
        return len(self._starts)

    def lines(self, places: Iterator[int]) -> Iterator[Line]:
        """Read the lines of requests, by their places."""
        with self.path.open("rb") as file:
            for place in places:
                file.seek(int(self._starts[place]))
                yield Line(place, int(self._numbers[place]), file.readline(), bool(self._repeats[place]))

    def _lines(self) -> Iterator[bytes]:
        try:
            with self.path.open("rb") as file:
                yield from file
        except OSError as error:
            raise BatchError(f"{self.path}: cannot be read: {error.strerror}") from error


def _name(line: bytes) -> bytes:
    """Hash of a request's id, 16 bytes; of the line if it has no id."""
    try:
        data, kind = read_id(line).encode(), b"id"
    except InvalidRequestError:
        data, kind = line.strip(), b"line"
    return blake2b(data, digest_size=16, person=b"oxjax " + kind).digest()
