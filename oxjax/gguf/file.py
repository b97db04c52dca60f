"""GGUF model on disk, in one file or several shards."""

import mmap
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final

import numpy as np
from jaxtyping import Shaped, UInt8

from oxjax.errors import GGUFError
from oxjax.gguf.metadata import Metadata
from oxjax.gguf.quants import dequantize, to_little_endian
from oxjax.gguf.shard import Shard, TensorInfo, read_shard


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Final = _Required()

# The name `llama_split_path` gives a shard; numbers count from one.
_SHARD_NAME = re.compile(r"(?P<prefix>.*)-(?P<no>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)


_DTYPE_KINDS: Final = {int: "iu", float: "fiu", bool: "b"}


class GGUFFile:
    """An opened model: metadata, and tensors that are read when asked for.

    The files stay mapped while this object, its `metadata` or an array from `raw` is alive.

    Attributes:
        metadata: read-only mapping of the first file's metadata.
        tensors: read-only mapping from name to `TensorInfo`, in file order, over all files.
        path: the first file; `paths` are all of them.
        version: 2 or 3; `byte_order`: "little" or "big"; `alignment`: in bytes, all of the first file.
        file_size: bytes of all files together.
    """

    def __init__(self, shards: Iterable[Shard]):
        shards = tuple(shards)
        first = shards[0]
        self.path: Path = first.path
        self.paths: tuple[Path, ...] = tuple(shard.path for shard in shards)
        self.version: int = first.version
        self.byte_order: str = first.byte_order
        self.alignment: int = first.alignment
        self.file_size: int = sum(len(shard.data) for shard in shards)
        self.metadata: Metadata = first.metadata
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(_merge_tensors(shards))
        self._shards: dict[Path, Shard] = {shard.path: shard for shard in shards}

    @classmethod
    def open(cls, path: str | Path) -> "GGUFFile":
        """Open a model by its file, by any shard of it, or by a directory that holds no other model.

        The headers of all files are read and checked in full; no tensor data is touched.

        Raises:
            GGUFError: no such file, not one model, not GGUF version 2 or 3, a missing shard, or a file
                that is truncated, corrupt or contradicts itself. Names file, byte offset and field.
        """
        path = Path(path)
        if _is_directory(path):
            path = _only_model(path)
        return cls(_read_shards(path))

    def get(self, key: str, kind: type[int | float | bool | str], default: Any = REQUIRED) -> Any:
        """Return a scalar of the metadata as `kind`.

        Args:
            key: metadata key.
            kind: `int` takes every integer type, `float` also integers, `bool` and `str` only themselves.
            default: what to return when the key is absent, whatever its type.

        Raises:
            GGUFError: absent without a default, or of another type.
        """
        if key not in self.metadata:
            return self._absent(key, kind.__name__, default)
        value = self.metadata[key]
        accepted = (int, float) if kind is float else kind
        if isinstance(value, accepted) and (kind is bool or not isinstance(value, bool)):
            return kind(value)
        raise self._mistyped(key, kind.__name__, value)

    def get_array(self, key: str, kind: type[int | float | bool | str], default: Any = REQUIRED) -> Any:
        """Return an array of the metadata: np.ndarray [n] of the stored type, or list[str] for `str`.

        Args:
            key: metadata key.
            kind: type of the items, as for `get`.
            default: what to return when the key is absent, whatever its type.

        Raises:
            GGUFError: absent without a default, not a flat array, or of items of another type.
        """
        if key not in self.metadata:
            return self._absent(key, f"array of {kind.__name__}", default)
        value = self.metadata[key]
        if isinstance(value, np.ndarray) and value.dtype.kind in _DTYPE_KINDS.get(kind, ""):
            return value
        if kind is str and isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
        raise self._mistyped(key, f"array of {kind.__name__}", value)

    def raw(self, name: str) -> UInt8[np.ndarray, "n_bytes"]:
        """Return the stored bytes of a tensor: uint8 [n_bytes], a read-only view of the mapped file.

        Raises:
            GGUFError: the file has no such tensor, or was closed.
        """
        info = self._info(name)
        if info.path not in self._shards:
            raise GGUFError("the file was closed; open it again", path=info.path, field=name)
        data = self._shards[info.path].data
        return np.frombuffer(data, np.uint8, count=info.n_bytes, offset=info.offset)

    def tensor(self, name: str) -> Shaped[np.ndarray, "..."]:
        """Return a tensor of shape `tensors[name].shape`, decoded exactly.

        float32 for F32, F16, BF16 and block formats; float64 for F64; integers keep their type. F32, F64 and
        integers of little-endian files are read-only views of the mapped file, everything else is new.

        Raises:
            GGUFError: the file has no such tensor, or was closed.
        """
        info, raw = self._info(name), self.raw(name)
        if self.byte_order == "big":
            raw = to_little_endian(raw, info.ggml_type)
        return dequantize(raw, info.ggml_type, info.shape)

    def rows(self, name: str, start: int, stop: int) -> Shaped[np.ndarray, "rows *row"]:
        """Return a part of a matrix, or of a stack of them, decoded as by `tensor` without reading the rest.

        Raises:
            GGUFError: the file has no such tensor, it has one axis only, or the file was closed.
        """
        info = self._info(name)
        if len(info.shape) < 2 or not 0 <= start <= stop <= info.shape[0]:
            raise GGUFError(f"shape {info.shape} has no rows {start} to {stop}", path=info.path, field=name)
        row_bytes = info.n_bytes // info.shape[0]
        raw = self.raw(name)[start * row_bytes : stop * row_bytes]
        if self.byte_order == "big":
            raw = to_little_endian(raw, info.ggml_type)
        return dequantize(raw, info.ggml_type, (stop - start, *info.shape[1:]))

    def release(self, name: str) -> None:
        """Tell the system that a tensor's part of the mapping will not be read again soon.

        Mapped pages that were read count as this process's memory until then. Arrays that view them stay valid.
        """
        info = self._info(name)
        if info.path in self._shards and hasattr(mmap, "MADV_DONTNEED"):
            start = info.offset - info.offset % mmap.PAGESIZE
            self._shards[info.path].data.madvise(mmap.MADV_DONTNEED, start, info.offset + info.n_bytes - start)

    def close(self) -> None:
        """Close the files. Arrays and metadata returned before stay valid."""
        self._shards = {}

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"GGUFFile({str(self.path)!r}, {len(self.tensors)} tensors, {len(self.metadata)} metadata keys)"

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise GGUFError(f"no such tensor among the {len(self.tensors)} of the file", path=self.path, field=name)
        return self.tensors[name]

    def _absent(self, key: str, expected: str, default: Any) -> Any:
        if default is REQUIRED:
            raise GGUFError(f"metadata key is missing, expected {expected}", path=self.path, field=key)
        return default

    def _mistyped(self, key: str, expected: str, value: object) -> GGUFError:
        found = f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        offset = self.metadata.offset(key)
        return GGUFError(f"found {found}, expected {expected}", path=self.path, offset=offset, field=key)


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError) as e:
        raise GGUFError(f"cannot be opened: {e}", path=path) from e


def _only_model(directory: Path) -> Path:
    try:
        files = sorted(p for p in directory.iterdir() if p.suffix == ".gguf" and p.is_file())
    except OSError as e:
        raise GGUFError(f"cannot be listed: {e}", path=directory) from e
    models: dict[str, Path] = {}
    for file in files:
        shard = _SHARD_NAME.fullmatch(file.name)
        models.setdefault(f"{shard['prefix']} ({int(shard['count'])} shards)" if shard else file.name, file)
    if not models:
        raise GGUFError("directory without a .gguf file", path=directory)
    if len(models) > 1:
        raise GGUFError(f"directory with {len(models)} models, name one: {', '.join(models)}", path=directory)
    return next(iter(models.values()))


def shard_names(name: str) -> list[str]:
    """File names of the set that a shard's name belongs to, in order; any other name alone."""
    shard = _SHARD_NAME.fullmatch(name)
    if shard is None:
        return [name]
    return [f"{shard['prefix']}-{no + 1:05d}-of-{shard['count']}.gguf" for no in range(int(shard["count"]))]


def _read_shards(path: Path) -> list[Shard]:
    """Read a file and, if it is a shard, the others of its set, in order."""
    found = read_shard(path)
    name = _SHARD_NAME.fullmatch(path.name)
    named = (int(name["no"]), int(name["count"])) if name else (1, 1)
    # Files merged by gguf-split keep a count of 0.
    count = _split_field(found, "split.count", 0) or 1
    if count == 1 and named[1] == 1:
        return [found]
    if name is None or named[1] != count or not 1 <= named[0] <= count:
        message = f"{count} files by the metadata, but shard {named[0]} of {named[1]} by the name"
        hint = "shards are named like <model>-00001-of-00003.gguf"
        raise GGUFError(f"{message}; {hint}", path=path, field="split.count")
    shards = []
    for no, shard_name in enumerate(shard_names(path.name)):
        shard_path = path.with_name(shard_name)
        if shard_path != path and not shard_path.exists():
            raise GGUFError(f"shard {no + 1} of {count} is missing (looked for from {path.name})", path=shard_path)
        shards.append(found if shard_path == path else read_shard(shard_path))
        _check_shard(shards[-1], no, found)
    return shards


def _check_shard(shard: Shard, no: int, found: Shard) -> None:
    """Check shard `no` (from zero) of the set that `found` belongs to."""
    expected = {
        "split.no": no,
        "split.count": _split_field(found, "split.count", 1),
        "split.tensors.count": _split_field(found, "split.tensors.count", -1),
    }
    for key, value in expected.items():
        if (stored := _split_field(shard, key, -1)) != value:
            offset = shard.metadata.offset(key) if key in shard.metadata else None
            raise GGUFError(f"found {stored}, expected {value}", path=shard.path, offset=offset, field=key)
    if shard.byte_order != found.byte_order:
        message = f"{shard.byte_order}-endian, but {found.path.name} is {found.byte_order}-endian"
        raise GGUFError(message, path=shard.path, offset=4, field="version")


def _split_field(shard: Shard, key: str, default: int) -> int:
    value = shard.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        offset = shard.metadata.offset(key)
        message = f"found {type(value).__name__}, expected an integer"
        raise GGUFError(message, path=shard.path, offset=offset, field=key)
    return value


def _merge_tensors(shards: tuple[Shard, ...]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in shard.tensors.items():
            if name in tensors:
                message = f"duplicate tensor name, also in {tensors[name].path.name}"
                raise GGUFError(message, path=shard.path, field=name)
            tensors[name] = info
    declared = _split_field(shards[0], "split.tensors.count", len(tensors))
    if len(shards) > 1 and declared != len(tensors):
        message = f"{declared} tensors declared, {len(tensors)} found in {len(shards)} files"
        raise GGUFError(message, path=shards[0].path, field="split.tensors.count")
    return tensors
