"""One GGUF file: header, metadata and tensor table, all checked against the file before anything is used."""

from __future__ import annotations

import math
import mmap
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from oxjax.errors import GGUFError
from oxjax.gguf.ggml_types import ACTIVATION_ONLY, GGMLType, block_layout
from oxjax.gguf.metadata import Cursor, Metadata, ValueType, read_metadata
from oxjax.gguf.quants import has_big_endian_form

_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4  # GGML_MAX_DIMS
_MAX_TENSOR_NAME_BYTES = 64  # GGUF spec, gguf_tensor_info_t.name


@dataclass(frozen=True)
class TensorInfo:
    """Type, shape and position of a tensor.

    Invariant: `[offset, offset + n_bytes)` is inside the file and overlaps no other tensor.
    """

    name: str
    shape: tuple[int, ...]  # NumPy order: the reverse of GGUF's dimensions
    ggml_type: GGMLType
    offset: int  # in bytes from the start of `path`
    n_bytes: int
    n_elements: int
    path: Path


class _Entry(NamedTuple):
    """A `gguf_tensor_info_t`: its offset counts from the start of the data, known only after the last entry."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLType
    offset: int


@dataclass(frozen=True, eq=False)
class Shard:
    """One opened file of a model."""

    path: Path
    data: mmap.mmap
    version: int
    byte_order: str  # "little" or "big"
    alignment: int
    metadata: Metadata
    tensors: Mapping[str, TensorInfo]  # in file order


def read_shard(path: Path) -> Shard:
    """Map a GGUF file of version 2 or 3 and check its header; tensor data is not touched.

    Raises:
        GGUFError: the file cannot be opened, is not GGUF, is truncated, or contradicts itself.
    """
    data = _map(path)
    version, byte_order = _version(data, path)
    cur = Cursor(data, path, byte_order, pos=8)
    n_tensors, n_metadata = cur.count("tensor_count"), cur.count("metadata_kv_count")
    metadata = read_metadata(cur, n_metadata)
    alignment = _alignment(metadata, path)
    entries = _tensor_table(cur, n_tensors)
    data_start = -(-cur.pos // alignment) * alignment
    tensors = {entry.name: _place(entry, data_start, alignment, path, len(data)) for entry in entries}
    _check_overlap(tensors)
    if byte_order == "big":
        _check_big_endian(tensors)
    return Shard(path, data, version, byte_order, alignment, metadata, MappingProxyType(tensors))


def _map(path: Path) -> mmap.mmap:
    try:
        # Opening a pipe would block, so look before opening.
        if not stat.S_ISREG(path.stat().st_mode):
            raise GGUFError("not a regular file", path=path)
        with path.open("rb") as file:
            head = file.read(8)
            if head[:4] != b"GGUF":
                found = repr(head[:4]) if head else "an empty file"
                raise GGUFError(f"not a GGUF file: found {found}, expected b'GGUF'", path=path, offset=0, field="magic")
            if len(head) < 8:
                raise GGUFError("truncated inside the header", path=path, offset=len(head), field="version")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as e:
        # ValueError: a path with a NUL in it.
        raise GGUFError(f"cannot be opened: {e}", path=path) from e


def _version(data: mmap.mmap, path: Path) -> tuple[int, str]:
    """Read the version, which also tells the byte order (GGUF spec: no other field does)."""
    versions = {order: int.from_bytes(data[4:8], order) for order in ("little", "big")}
    for order, version in versions.items():
        if version in (2, 3):
            return version, order
    found = min(versions.values())
    raise GGUFError(f"GGUF version {found}, supported are 2 and 3", path=path, offset=4, field="version")


def _alignment(metadata: Metadata, path: Path) -> int:
    key = "general.alignment"
    if key not in metadata:
        return _DEFAULT_ALIGNMENT
    kind, value, offset = metadata.stored_type(key), metadata[key], metadata.offset(key)
    if kind is not ValueType.UINT32:
        raise GGUFError(f"of type {kind.name}, expected UINT32", path=path, offset=offset, field=key)
    assert isinstance(value, int)
    if value < 8 or value & (value - 1):
        raise GGUFError(f"alignment {value}, expected a power of two, 8 or more", path=path, offset=offset, field=key)
    return value


def _tensor_table(cur: Cursor, n: int) -> list[_Entry]:
    entries, seen = [], set()
    for i in range(n):
        at, field = cur.pos, f"tensor_info[{i}].name"
        name = cur.string(field, _MAX_TENSOR_NAME_BYTES)
        if not name:
            raise cur.error("empty tensor name", field, at)
        if name in seen:
            raise cur.error("duplicate tensor name", name, at)
        seen.add(name)
        entries.append(_tensor_entry(cur, name))
    return entries


def _tensor_entry(cur: Cursor, name: str) -> _Entry:
    at, n_dims = cur.pos, cur.u32(name)
    if n_dims > _MAX_DIMS:
        raise cur.error(f"{n_dims} dimensions, at most {_MAX_DIMS} are allowed", name, at)
    at = cur.pos
    shape = tuple(cur.u64(name) for _ in range(n_dims))[::-1]
    if 0 in shape:
        raise cur.error(f"empty tensor of shape {shape}", name, at)
    ggml_type = _ggml_type(cur, name)
    per_block, _ = block_layout(ggml_type)
    row = shape[-1] if shape else 1
    if row % per_block:
        message = f"rows of {row} elements, but {ggml_type.name} packs them in blocks of {per_block}"
        raise cur.error(message, name, at)
    return _Entry(name, shape, ggml_type, cur.u64(name))


def _ggml_type(cur: Cursor, name: str) -> GGMLType:
    at, number = cur.pos, cur.u32(name)
    try:
        ggml_type = GGMLType(number)
    except ValueError:
        raise cur.error(f"unknown tensor type {number}", name, at) from None
    if ggml_type in ACTIVATION_ONLY:
        raise cur.error(f"type {ggml_type.name} is a format of activations, not of weights", name, at)
    return ggml_type


def _place(entry: _Entry, data_start: int, alignment: int, path: Path, file_size: int) -> TensorInfo:
    """Find the tensor in the file and check that it is all there."""
    per_block, block_bytes = block_layout(entry.ggml_type)
    n_elements = math.prod(entry.shape)
    n_bytes = n_elements // per_block * block_bytes
    offset = data_start + entry.offset
    if entry.offset % alignment:
        message = f"offset {entry.offset} in the data is not a multiple of the alignment {alignment}"
        raise GGUFError(message, path=path, offset=offset, field=entry.name)
    if offset + n_bytes > file_size:
        what = f"shape {entry.shape} of {entry.ggml_type.name} takes {n_bytes} bytes"
        message = f"truncated: {what}, which end outside the file of {file_size}"
        raise GGUFError(message, path=path, offset=offset, field=entry.name)
    return TensorInfo(entry.name, entry.shape, entry.ggml_type, offset, n_bytes, n_elements, path)


def _check_overlap(tensors: Mapping[str, TensorInfo]) -> None:
    in_place = sorted(tensors.values(), key=lambda info: info.offset)
    for before, after in pairwise(in_place):
        if before.offset + before.n_bytes > after.offset:
            message = f"overlaps tensor {before.name!r}, whose {before.n_bytes} bytes start at {before.offset}"
            raise GGUFError(message, path=after.path, offset=after.offset, field=after.name)


def _check_big_endian(tensors: Mapping[str, TensorInfo]) -> None:
    for info in tensors.values():
        if not has_big_endian_form(info.ggml_type):
            message = f"ggml defines no big-endian form of {info.ggml_type.name}; convert the file to little-endian"
            raise GGUFError(message, path=info.path, offset=info.offset, field=info.name)
