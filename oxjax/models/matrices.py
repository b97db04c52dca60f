"""Matrices of a file in the form that a model holds them.

They turn from GGUF's `[d_out, d_in]` to `[d_in, d_out]` slab by slab on their way into one aligned buffer that the
device array then adopts, so loading needs little more memory than the parameters.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from itertools import accumulate, pairwise

import jax
import jax.numpy as jnp
import numpy as np
from gguf import quants as gguf_quants
from gguf.constants import GGMLQuantizationType
from jaxtyping import Array

from oxjax.gguf import GGUFFile
from oxjax.gguf.ggml_types import GGMLType, block_layout
from oxjax.gguf.planes import PLANE_FORMATS, has_planes, planes
from oxjax.gguf.quants import dequantize, to_little_endian
from oxjax.kernels.quantized import PANEL, QuantizedTensor, pack, panel_bytes

_ALIGNMENT = 64
_SLAB_BYTES = 1 << 20  # of float32: temporaries stay in the second cache
_PLAIN = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
_HALVES = {GGMLType.F16: np.dtype(np.float16), GGMLType.BF16: np.dtype(jnp.bfloat16)}


class Matrices:
    """Reads matrices; may be asked by several threads at once.

    Args:
        file: an open GGUF file.
        dense: the dtype of what is held as floats.
        count: called with the bytes of the file that were read, after each part.
        keep: hold the integers, or the 16 bits, of the file instead.
        quantize: with `keep`, the format that plain matrices are quantised to, where their rows fit it.
    """

    def __init__(
        self,
        file: GGUFFile,
        dense: np.dtype,
        count: Callable[[int], None],
        *,
        keep: bool,
        quantize: GGMLType | None,
    ):
        self._file, self._dense, self._count = file, dense, count
        self._keep, self._quantize = keep, quantize
        self._buffers = _Buffers()
        self._formats: dict[str, GGMLType | None] = {}

    def table(self, name: str, pool: Executor | None) -> Array | QuantizedTensor:
        """A tensor `[n, d]` as it is, or, quantised, `[d, n]`; see `columns` about the pool."""
        n, d = self._file.tensors[name].shape
        if self._format_of(name):
            return self._packed(name, d, range(n), pool)
        table = self._buffers.empty((n, d), self._dtype_of(name))

        def copy(start: int, stop: int) -> None:
            table[start:stop] = self._file.rows(name, start, stop)

        self._by_slabs(name, range(n), copy, pool)
        return jax.device_put(table, may_alias=True)

    def columns(
        self, name: str, rows: range, *, keep: bool, scale: np.float32 | None, pool: Executor | None
    ) -> Array | QuantizedTensor:
        """Some rows of a tensor `[d_out, d_in]` as columns.

        Args:
            name: of the tensor.
            rows: which.
            keep: allow the file's own form.
            scale: multiplies all, unless None.
            pool: threads that share the work; for calls that do not come from one of them.
        """
        d_in = self._file.tensors[name].shape[-1]
        if keep and scale is None and self._format_of(name):
            return self._packed(name, d_in, rows, pool)
        weight = self._buffers.empty((d_in, len(rows)), self._dtype_of(name) if keep and scale is None else self._dense)

        def turn(start: int, stop: int) -> None:
            slab = self._file.rows(name, start, stop)
            weight[:, start - rows.start : stop - rows.start] = (slab if scale is None else slab * scale).T

        self._by_slabs(name, rows, turn, pool)
        return jax.device_put(weight, may_alias=True)

    def experts(
        self, places: list[tuple[str, int]], d_outs: tuple[int, ...], scales: np.ndarray | None
    ) -> list[Array | QuantizedTensor]:
        """Maps of experts, stacked, taken apart where an expert's matrix holds several.

        Args:
            places: the tensor of each expert, and the matrix' number in it.
            d_outs: what the maps in a matrix give.
            scales: multiply each expert's, unless None.
        """
        kinds = {self._format_of(name) for name, _ in places}
        if scales is None and len(kinds) == 1 and None not in kinds:
            return self._packed_experts(places, d_outs)
        return self._dense_experts(places, d_outs, scales)

    def _packed_experts(self, places: list[tuple[str, int]], d_outs: tuple[int, ...]) -> list[QuantizedTensor]:
        d_in, form = self._file.tensors[places[0][0]].shape[-1], PLANE_FORMATS[self._format_of(places[0][0])]
        total, weights = sum(d_outs), []
        for start, stop in pairwise(accumulate(d_outs, initial=0)):
            data = self._buffers.empty(
                (len(places), -(-(stop - start) // PANEL), panel_bytes(d_in, form)), np.dtype(np.uint8)
            )
            for panels, (name, i) in zip(data, places, strict=True):
                self._pack(name, panels, d_in, range(i * total + start, i * total + stop))
            data = jax.device_put(data, may_alias=True)
            weights.append(QuantizedTensor(data, (d_in, stop - start), form))
        return weights

    def _dense_experts(
        self, places: list[tuple[str, int]], d_outs: tuple[int, ...], scales: np.ndarray | None
    ) -> list[Array]:
        dtype, ends = self._dtype_of(places[0][0]), np.cumsum(d_outs)
        d_in = self._file.tensors[places[0][0]].shape[-1]
        weights = [self._buffers.empty((len(places), d_in, d_out), dtype) for d_out in d_outs]
        for e, (name, i) in enumerate(places):
            stacked = len(self._file.tensors[name].shape) == 3
            matrix = self._file.rows(name, i, i + 1)[0] if stacked else self._file.tensor(name)
            scale = np.float32(1.0) if scales is None else scales[e]
            for weight, part in zip(weights, np.split(matrix, ends[:-1]), strict=True):
                np.multiply(part.T, scale, out=weight[e], casting="unsafe")
            self._count(self._file.tensors[name].n_bytes // (len(places) if stacked else 1))
        return [jax.device_put(w, may_alias=True) for w in weights]

    def _format_of(self, name: str) -> GGMLType | None:
        """The format that a matrix is held in, unless it is held as floats. What decides is read once."""
        if name not in self._formats:
            self._formats[name] = self._chosen_format(name)
        return self._formats[name]

    def _chosen_format(self, name: str) -> GGMLType | None:
        info = self._file.tensors[name]
        if not self._keep:
            return None
        if info.ggml_type in PLANE_FORMATS:
            fits = self._file.byte_order == "little" and has_planes(self._file.raw(name), info.ggml_type)
            return info.ggml_type if fits else None
        fits = self._quantize is not None and info.shape[-1] % block_layout(self._quantize)[0] == 0
        return self._quantize if fits and info.ggml_type in _PLAIN else None

    def _dtype_of(self, name: str) -> np.dtype:
        """The dtype of a matrix that is held as floats."""
        half = _HALVES.get(self._file.tensors[name].ggml_type) if self._keep else None
        return self._dense if half is None else half

    def _packed(self, name: str, d_in: int, rows: range, pool: Executor | None) -> QuantizedTensor:
        """Some rows of a `[d_out, d_in]` tensor as columns, in the format that it is held in."""
        form = PLANE_FORMATS[self._format_of(name)]
        data = self._buffers.empty((-(-len(rows) // PANEL), panel_bytes(d_in, form)), np.dtype(np.uint8))
        self._pack(name, data, d_in, rows, pool)
        return QuantizedTensor(jax.device_put(data, may_alias=True), (d_in, len(rows)), form)

    def _pack(self, name: str, data: np.ndarray, d_in: int, rows: range, pool: Executor | None = None) -> None:
        """Fill panels with rows of a tensor, counted over all leading axes."""
        kind = self._format_of(name)

        def lay_out(start: int, stop: int) -> None:
            parts = planes(self._blocks(name, kind, d_in, start, stop), kind, (stop - start, d_in))
            first, last = (start - rows.start) // PANEL, -(-(stop - rows.start) // PANEL)
            pack(parts, PLANE_FORMATS[kind], data[first:last])

        self._by_slabs(name, rows, lay_out, pool, least=PANEL)

    def _blocks(self, name: str, kind: GGMLType, d_in: int, first: int, last: int) -> np.ndarray:
        """Bytes of rows of a matrix in a format: the file's, or what the `gguf` package makes of plain ones."""
        stored = self._file.tensors[name].ggml_type
        per_block, block_bytes = block_layout(stored)
        row_bytes = d_in // per_block * block_bytes
        raw = self._file.raw(name)[first * row_bytes : last * row_bytes]
        if stored == kind:
            return raw
        if self._file.byte_order == "big":
            raw = to_little_endian(raw, stored)
        rows = dequantize(raw, stored, (last - first, d_in))
        return gguf_quants.quantize(np.ascontiguousarray(rows), GGMLQuantizationType(kind)).reshape(-1)

    def _by_slabs(
        self, name: str, rows: range, work: Callable[[int, int], None], pool: Executor | None, least: int = 1
    ) -> None:
        """Call `work(start, stop)` for slabs of a multiple of `least` rows of a matrix: one by one, or in a pool."""
        info = self._file.tensors[name]
        step = max(_SLAB_BYTES // (4 * info.shape[-1] * least), 1) * least

        def one(start: int) -> None:
            stop = min(start + step, rows.stop)
            work(start, stop)
            self._count((stop - start) * info.shape[-1] * info.n_bytes // info.n_elements)

        for _ in (map if pool is None else pool.map)(one, range(rows.start, rows.stop, step)):
            pass


class _Buffers:
    """Uninitialised arrays at 64-byte boundaries, which lets XLA:CPU adopt them without a copy.

    Small ones are parts of large pieces: NumPy asks for huge pages for those, through which products stream faster.
    """

    _PIECE, _LARGE = 32 << 20, 8 << 20

    def __init__(self) -> None:
        self._lock, self._piece, self._used = threading.Lock(), np.empty(0, np.uint8), 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        n_bytes = math.prod(shape) * dtype.itemsize
        if n_bytes >= self._LARGE:
            return self._cut(np.empty(n_bytes + _ALIGNMENT, np.uint8), 0, shape, dtype)
        with self._lock:
            if self._used + n_bytes + _ALIGNMENT > len(self._piece):
                self._piece, self._used = np.empty(self._PIECE, np.uint8), 0
            part = self._cut(self._piece, self._used, shape, dtype)
            self._used += n_bytes + _ALIGNMENT
        return part

    @staticmethod
    def _cut(piece: np.ndarray, start: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        start += -(piece.ctypes.data + start) % _ALIGNMENT
        return piece[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
