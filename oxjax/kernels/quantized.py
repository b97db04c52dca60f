"""Weights that stay the integers of their file, and products with them.

Sixteen outputs make a panel, the unit that a kernel reads from front to back: the codes of every 32 inputs, then
scales, minima, and their integer parts. Codes lie as `[d_in / 4, 16 outputs, 4 inputs]`, so that a vector of 64
bytes holds four inputs of each output: what one integer dot instruction takes.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from oxjax.gguf.planes import SUPER_BLOCK, PlaneFormat, Planes
from oxjax.kernels.dot import dot_by_parts
from oxjax.kernels.native import ffi_call
from oxjax.kernels.numerics import Numerics

PANEL = 16  # outputs that lie together
CHUNK = 32  # inputs whose codes lie together; activations share a scale over as many


@struct.dataclass
class QuantizedTensor:
    """A matrix `[d_in, d_out]` in panels of 16 outputs, the last one filled up with zeros; or one for each expert."""

    data: UInt8[Array, "*n_experts panels panel_bytes"]
    shape: tuple[int, int] = struct.field(pytree_node=False)
    format: PlaneFormat = struct.field(pytree_node=False)


def _sections(d_in: int, form: PlaneFormat) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and type of the parts of a panel, in their order."""
    scales = d_in // (SUPER_BLOCK if form.two_level else form.group)
    parts: dict[str, tuple[tuple[int, ...], Any]] = {
        "codes": ((d_in // CHUNK, form.bits, PANEL, 4), np.uint8),
        "scales": ((scales, PANEL), np.float16),
    }
    if form.minima:
        parts["minima"] = ((scales, PANEL), np.float16)
    if form.two_level:
        parts["sub_scales"] = ((d_in // form.group, PANEL), np.int8)
        if form.minima:
            parts["sub_minima"] = ((d_in // form.group, PANEL), np.int8)
    return parts


def panel_bytes(d_in: int, form: PlaneFormat) -> int:
    """Bytes of a panel: a multiple of 64, so that codes are aligned."""
    total = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in _sections(d_in, form).values())
    return -(-total // 64) * 64


def pack(parts: Planes, form: PlaneFormat, out: UInt8[np.ndarray, "panels panel_bytes"]) -> None:
    """Lay rows of planes (the outputs) out as panels.

    Args:
        parts: up to `16 * panels` rows; what is missing becomes zeros.
        form: what they are.
        out: is filled.
    """
    n_panels, d_in = out.shape[0], parts.codes.shape[1]
    at = 0
    for name, (shape, dtype) in _sections(d_in, form).items():
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        rows = getattr(parts, name)
        if short := n_panels * PANEL - rows.shape[0]:
            rows = np.pad(rows, ((0, short), (0, 0)))
        if name == "codes":
            section = _packed_codes(rows.reshape(n_panels, PANEL, d_in), form.bits)
        else:
            section = np.ascontiguousarray(rows.reshape(n_panels, PANEL, -1).swapaxes(1, 2))
        out[:, at : at + n_bytes] = section.reshape(n_panels, -1).view(np.uint8)
        at += n_bytes
    out[:, at:] = 0


def _packed_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 `[panels, 16, d_in]` to `[panels, d_in / 32, bits, 64]`.

    Eight vectors of 64 codes come from 32 inputs. Their low halves pair up, vector i with i + 4; further bits of
    vector i lie at bit i of a ninth part (five bits), or at bits 2 (i mod 4) of one of two (six).
    """
    fours = np.ascontiguousarray(codes.view(np.uint32).swapaxes(1, 2))  # [panels, d_in / 4, 16]
    vectors = fours.view(np.uint8).reshape(len(codes), -1, 8, 4 * PANEL)
    if bits == 8:
        return vectors
    packed = [(vectors[:, :, :4] & 15) | (vectors[:, :, 4:] << 4)]
    if bits > 4:
        n = bits - 4  # further bits of a code, and vectors they fill
        shifts = (np.arange(8 // n, dtype=np.uint8) * n)[:, None]
        further = (vectors >> 4).reshape(*vectors.shape[:2], n, 8 // n, 4 * PANEL) << shifts
        packed.append(np.bitwise_or.reduce(further, axis=3))
    return np.concatenate(packed, axis=2)


def _parts(data: Array, d_in: int, form: PlaneFormat) -> dict[str, Array]:
    """Bytes of panels `[n, panel_bytes]` as the arrays they are, panels first."""
    found, at = {}, 0
    for name, (shape, dtype) in _sections(d_in, form).items():
        size = np.dtype(dtype).itemsize
        section = data[:, at : at + math.prod(shape) * size]
        at += math.prod(shape) * size
        wide = section.reshape(-1, *shape) if size == 1 else section.reshape(-1, *shape, size)
        found[name] = lax.bitcast_convert_type(wide, dtype)
    return found


def _values(parts: dict[str, Array], form: PlaneFormat) -> Float[Array, "n *lanes d_in"]:
    """Dequantise: codes `[n, chunks, bits, *lanes, 4]`, scales `[n, groups, *lanes]`; every product is exact."""
    codes = parts["codes"]
    if form.bits < 8:
        low = jnp.concatenate([codes[:, :, :4] & 15, codes[:, :, :4] >> 4], axis=2)
        if form.bits > 4:
            n = form.bits - 4
            shifts = (jnp.arange(8 // n, dtype=jnp.uint8) * n).reshape(-1, *(1,) * (codes.ndim - 3))
            further = (codes[:, :, 4:, None] >> shifts) & (2**n - 1)
            low = low | (further.reshape(low.shape) << 4)
        codes = low
    codes = jnp.moveaxis(codes, (1, 2), (-3, -2))  # [n, *lanes, chunks, 8, 4]
    codes = codes.reshape(*codes.shape[:-3], -1, form.group)

    def level(name: str) -> Array:
        numbers = jnp.moveaxis(parts[name].astype(jnp.float32), 1, -1)
        if form.two_level:
            per_scale = SUPER_BLOCK // form.group
            numbers = jnp.repeat(numbers, per_scale, axis=-1)
            numbers = numbers * jnp.moveaxis(parts[f"sub_{name}"].astype(jnp.float32), 1, -1)
        return numbers[..., None]

    values = level("scales") * (codes.astype(jnp.float32) - float(form.offset))
    if form.minima:
        values = values + level("minima")
    return values.reshape(*values.shape[:-2], -1)


def dequantize(w: QuantizedTensor) -> Float[Array, "d_in d_out"]:
    """The matrix in float32, bit for bit what `gguf.quants.dequantize` gives (transposed)."""
    d_in, d_out = w.shape
    values = _values(_parts(w.data, d_in, w.format), w.format)  # [panels, 16, d_in]
    return values.reshape(-1, d_in)[:d_out].T


def _outputs(w: QuantizedTensor, start: Array | int, n: int) -> Float[Array, "d_in n"]:
    """The weights of some outputs, from a multiple of `PANEL` on."""
    data = lax.dynamic_slice_in_dim(w.data, start // PANEL, -(-n // PANEL))
    return dequantize(QuantizedTensor(data, (w.shape[0], n), w.format))


def columns(w: QuantizedTensor, ids: Int[Array, " n"]) -> Float[Array, "n d_in"]:
    """Chosen outputs' weights in float32: rows of an embedding table."""
    d_in = w.shape[0]
    parts = _parts(w.data[ids // PANEL], d_in, w.format)

    def one_lane(name: str, part: Array) -> Array:
        axis = 3 if name == "codes" else 2
        index = (ids % PANEL).reshape(-1, *(1,) * (part.ndim - 1))
        return jnp.take_along_axis(part, index, axis=axis).squeeze(axis)

    return _values({name: one_lane(name, part) for name, part in parts.items()}, w.format)


def format_fields(f: PlaneFormat) -> tuple[int, ...]:
    """As native kernels take it."""
    return f.bits, f.offset, f.group, f.two_level, f.minima


def quantized_matmul(
    x: Float[Array, "rows d_in"], *weights: QuantizedTensor, numerics: Numerics
) -> tuple[Float[Array, "rows _"], ...]:
    """`x @ w` for each weight, in float32.

    With int8 activations the native kernel quantises groups of 32 of them and sums integers; its result differs from
    the product with `dequantize(w)` by that rounding. With float32 activations it has the bits of the exact `dot` with
    `dequantize(w)`, and no more than a small part of the matrix is dequantised at any time. Either way the bits of a
    row never depend on other rows. The XLA backend never rounds activations.

    Args:
        x: float32 activations.
        weights: several share the quantised activations.
        numerics: see `Numerics`; the native kernel is always exact.
    """
    if not numerics.native:
        return tuple(dot_by_parts(x, partial(_outputs, w), w.shape[1], numerics=numerics) for w in weights)
    fields = np.array([format_fields(w.format) for w in weights], np.int64).reshape(-1)
    rounds = numerics.activations == "int8"
    results = [jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), jnp.float32) for w in weights]
    call = ffi_call("quantized_matmul", results)
    return tuple(call(x, *(w.data for w in weights), formats=fields, rounds=rounds))
