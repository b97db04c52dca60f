"""Metadata of one GGUF file: checked in full when the file opens, decoded value by value when asked for."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np

from oxjax.errors import GGUFError

# int, float, bool, str, np.ndarray [n] of numbers or booleans, list[str], or list of arrays (nested).
Value = int | float | bool | str | np.ndarray | list[Any]

MAX_NAME_BYTES = 65535  # GGUF spec, gguf_metadata_kv_t.key: "at most 2^16-1 bytes long"
_MAX_DEPTH = 8
# What a hostile header can cost in time and memory is bounded by these; real ones stay far below: the largest
# vocabularies take some 16 MB, the largest models have a few thousand tensors.
_MAX_HEADER_BYTES = 1 << 28
_MAX_ENTRIES = 1 << 16


class ValueType(IntEnum):
    """`gguf_metadata_value_type` of the GGUF spec."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_DTYPES = {
    ValueType.UINT8: "u1",
    ValueType.INT8: "i1",
    ValueType.UINT16: "u2",
    ValueType.INT16: "i2",
    ValueType.UINT32: "u4",
    ValueType.INT32: "i4",
    ValueType.FLOAT32: "f4",
    ValueType.BOOL: "?",
    ValueType.UINT64: "u8",
    ValueType.INT64: "i8",
    ValueType.FLOAT64: "f8",
}


class Cursor:
    """A reading position in the header of a mapped file; every step is checked against the end of the file.

    Invariant: `0 <= pos <= size`, so nothing outside the file is ever asked for.
    """

    def __init__(self, data: mmap.mmap, path: Path, byte_order: str, pos: int):
        self.data, self.path, self.pos = data, path, pos
        self.size = min(len(data), _MAX_HEADER_BYTES)
        self.order: Literal["<", ">"] = "<" if byte_order == "little" else ">"
        self._u32, self._u64 = struct.Struct(self.order + "I"), struct.Struct(self.order + "Q")
        self._inner_arrays_left = _MAX_ENTRIES

    def error(self, message: str, field: str, offset: int | None = None) -> GGUFError:
        """Build the error about `field` at `offset` (here, unless given)."""
        return GGUFError(message, path=self.path, offset=self.pos if offset is None else offset, field=field)

    def past_end(self, n: int, field: str, offset: int | None = None) -> GGUFError:
        """Build the error about `n` bytes that would end outside the file or the longest header."""
        if self.size < len(self.data):
            return self.error(f"{n} bytes expected, but no header goes past {self.size}", field, offset)
        return self.error(f"truncated: {n} bytes expected in a file of {self.size}", field, offset)

    def skip(self, n: int, field: str) -> int:
        """Step over `n` bytes and return where they start."""
        start = self.pos
        if n > self.size - start:
            raise self.past_end(n, field)
        self.pos = start + n
        return start

    def u32(self, field: str) -> int:
        """Read a `uint32_t`."""
        return self._u32.unpack_from(self.data, self.skip(4, field))[0]

    def u64(self, field: str) -> int:
        """Read a `uint64_t`."""
        return self._u64.unpack_from(self.data, self.skip(8, field))[0]

    def string(self, field: str, max_bytes: int | None = None) -> str:
        """Read a `gguf_string_t`; bytes that are not UTF-8 become surrogate escapes."""
        at, length = self.pos, self.u64(field)
        if max_bytes is not None and length > max_bytes:
            raise self.error(f"string of {length} bytes, at most {max_bytes} are allowed", field, at)
        start = self.skip(length, field)
        return self.data[start : self.pos].decode("utf-8", "surrogateescape")

    def value_type(self, field: str) -> ValueType:
        """Read a `gguf_metadata_value_type`."""
        at, number = self.pos, self.u32(field)
        try:
            return ValueType(number)
        except ValueError:
            raise self.error(f"unknown value type {number}, expected 0 to 12", field, at) from None

    def count(self, field: str) -> int:
        """Read how many key-value pairs or tensors follow."""
        at, n = self.pos, self.u64(field)
        if n > _MAX_ENTRIES:
            raise self.error(f"{n} entries, at most {_MAX_ENTRIES} are read", field, at)
        return n

    def enter_arrays(self, n: int, field: str) -> None:
        """Check that `n` more inner arrays are worth walking."""
        if n > self._inner_arrays_left:
            raise self.error(f"{n} inner arrays, at most {_MAX_ENTRIES} are read from one file", field)
        self._inner_arrays_left -= n

    def skip_strings(self, n: int, field: str) -> None:
        """Step over `n` strings. This loop is most of the time that opening a file takes."""
        if n * 8 > self.size - self.pos:
            raise self.past_end(n * 8, field)
        data, size, pos, length_at = self.data, self.size, self.pos, self._u64.unpack_from
        for _ in range(n):
            if pos + 8 > size:
                raise self.past_end(8, field, pos)
            (length,) = length_at(data, pos)
            if length > size - pos - 8:
                raise self.past_end(length, field, pos)
            pos += 8 + length
        self.pos = pos

    def strings(self, n: int) -> list[str]:
        """Read `n` strings that `skip_strings` has checked."""
        data, pos, length_at = self.data, self.pos, self._u64.unpack_from
        out = []
        for _ in range(n):
            start = pos + 8
            pos = start + length_at(data, pos)[0]
            out.append(data[start:pos].decode("utf-8", "surrogateescape"))
        self.pos = pos
        return out


def _skip_value(cur: Cursor, kind: ValueType, key: str) -> None:
    """Step over a value and check all of it, building nothing."""
    if kind is ValueType.STRING:
        cur.skip_strings(1, key)
    elif kind is ValueType.ARRAY:
        _skip_array(cur, key, depth=0)
    else:
        _skip_numbers(cur, kind, 1, key)


def _skip_array(cur: Cursor, key: str, depth: int) -> None:
    if depth == _MAX_DEPTH:
        raise cur.error(f"arrays nested more than {_MAX_DEPTH} deep", key)
    item, n = cur.value_type(key), cur.u64(key)
    if item is ValueType.STRING:
        cur.skip_strings(n, key)
    elif item is ValueType.ARRAY:
        cur.enter_arrays(n, key)
        for _ in range(n):
            _skip_array(cur, key, depth + 1)
    else:
        _skip_numbers(cur, item, n, key)


def _skip_numbers(cur: Cursor, kind: ValueType, n: int, key: str) -> None:
    start = cur.skip(n * np.dtype(_DTYPES[kind]).itemsize, key)
    if kind is ValueType.BOOL:
        values = np.frombuffer(cur.data, np.uint8)[start : cur.pos]
        if values.max(initial=0) > 1:
            at = start + int(np.argmax(values > 1))
            raise cur.error(f"bool holds {cur.data[at]}, expected 0 or 1", key, at)


def _read_value(cur: Cursor, kind: ValueType) -> Value:
    """Decode a value that `_skip_value` has checked."""
    if kind is ValueType.STRING:
        return cur.string("")
    if kind is ValueType.ARRAY:
        return _read_array(cur)
    return _read_numbers(cur, kind, 1)[0].item()


def _read_array(cur: Cursor) -> np.ndarray | list[Any]:
    item, n = cur.value_type(""), cur.u64("")
    if item is ValueType.STRING:
        return cur.strings(n)
    if item is ValueType.ARRAY:
        return [_read_array(cur) for _ in range(n)]
    return _read_numbers(cur, item, n)


def _read_numbers(cur: Cursor, kind: ValueType, n: int) -> np.ndarray:
    dtype = np.dtype(_DTYPES[kind])
    start = cur.skip(n * dtype.itemsize, "")
    stored = np.frombuffer(cur.data, np.uint8)[start : cur.pos].view(dtype.newbyteorder(cur.order))
    values = stored.astype(dtype)
    values.flags.writeable = False
    return values


class Metadata(Mapping[str, Value]):
    """Read-only mapping from metadata keys to values, in file order.

    Scalars are int, float, bool or str; arrays are np.ndarray [n] of the stored type, list[str]
    for strings, and lists of these when nested. A value is decoded when first asked for, then kept.
    """

    def __init__(self, data: mmap.mmap, path: Path, byte_order: str, places: Mapping[str, tuple[ValueType, int]]):
        self._data, self._path, self._byte_order, self._places = data, path, byte_order, places
        self._values: dict[str, Value] = {}

    def __getitem__(self, key: str) -> Value:
        if key not in self._values:
            kind, start = self._places[key]
            self._values[key] = _read_value(Cursor(self._data, self._path, self._byte_order, start), kind)
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"Metadata({', '.join(self)})"

    def stored_type(self, key: str) -> ValueType:
        """Say what type the file gives the value."""
        return self._places[key][0]

    def offset(self, key: str) -> int:
        """Say where in the file the value starts."""
        return self._places[key][1]


def read_metadata(cur: Cursor, n: int) -> Metadata:
    """Walk and check `n` key-value pairs (GGUF spec, `gguf_metadata_kv_t`) from the cursor on.

    Raises:
        GGUFError: a pair is truncated, of unknown type, a duplicate, or absurd; names the key.
    """
    places: dict[str, tuple[ValueType, int]] = {}
    for i in range(n):
        at, key = cur.pos, cur.string(f"metadata_kv[{i}].key", MAX_NAME_BYTES)
        if not key:
            raise cur.error("empty key", f"metadata_kv[{i}].key", at)
        if key in places:
            raise cur.error("duplicate key", key, at)
        kind = cur.value_type(key)
        places[key] = (kind, cur.pos)
        _skip_value(cur, kind, key)
    return Metadata(cur.data, cur.path, "little" if cur.order == "<" else "big", places)
