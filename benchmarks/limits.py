"""What the machine can do at most: reading memory, and multiplying matrices of integers and of floats.

Every limit is the best of several ways, some of which owe nothing to oxjax, so that a slow kernel of ours cannot make
what is built on it look good.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from oxjax.gguf import GGUFFile
from oxjax.gguf.ggml_types import GGMLType
from oxjax.gguf.planes import PLANE_FORMATS
from oxjax.kernels import native
from oxjax.kernels.dot import dot
from oxjax.kernels.numerics import Numerics
from oxjax.kernels.quantized import PANEL, QuantizedTensor, panel_bytes, quantized_matmul
from oxjax.models.load import load_config

_REPEATS = 5
_ROWS = 512


class Engine:
    """The machine, in the place of an engine.

    Args:
        threads: that this process has been given.
        megabytes: to stream; must be many times what caches hold.
        width: of the square matrices whose product is timed.
    """

    def __init__(self, threads: int, *, megabytes: int, width: int):
        self.threads, self.bytes, self.width = threads, megabytes << 20, width

    def describe(self, model: str) -> dict[str, Any]:
        """The machine, and what must be known of a model before it is loaded; sizes in bytes."""
        with GGUFFile.open(model) as file:
            config, size = load_config(file), file.file_size
        if jax.default_backend() != "cpu":
            config = dataclasses.replace(config, dtype="bfloat16")
        return {
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            "kernels": native.describe(),
            "memory": _available_memory(),
            "architecture": config.architecture,
            "vocabulary": config.vocab_size,
            "context": config.context_length,
            "cache_bytes": config.page_bytes(1),
            "file_bytes": size,
        }

    def measure(self) -> dict[str, tuple[float, str]]:
        """The best rate of each kind, bytes or operations in a second, and what reached it; kinds that exist only."""
        ways = {"memory": self._streams(), "float": self._float_products(), "integer": self._integer_products()}
        return {kind: max(rates) for kind, rates in ways.items() if rates}

    def _streams(self) -> list[tuple[float, str]]:
        n = self.bytes // 4
        numbers = jnp.ones(n, jnp.float32)
        found = [(2 * self.bytes / _best(jax.jit(lambda x: x + 1), numbers), "XLA, x + 1")]
        if jax.default_backend() != "cpu":
            return found
        parts = np.array_split(np.asarray(numbers), self.threads)
        with ThreadPoolExecutor(self.threads) as pool:
            found.append((self.bytes / _best(lambda: list(pool.map(_read, parts))), "NumPy, sums"))
        if native.kernels():
            matrix = _quantized(2 * self.width, self.bytes // (2 * self.width))
            step = jax.jit(lambda x, w: quantized_matmul(x, w, numerics=_numerics()))
            row = _normal(1, matrix.shape[0])
            found.append((matrix.data.nbytes / _best(step, row, matrix), "quantized_matmul, one row"))
        return found

    def _float_products(self) -> list[tuple[float, str]]:
        """bfloat16 on accelerators and float32 on CPUs, as models run there; NumPy's are its BLAS library's."""
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        x = _normal(max(_ROWS, self.width), self.width).astype(dtype)
        operations = 2 * x.size * self.width
        found = [(operations / _best(jax.jit(jnp.matmul), x, x[: self.width]), "XLA, matmul")]
        if jax.default_backend() == "cpu":
            product = jax.jit(lambda x, w: dot(x, w, numerics=_numerics()))
            found.append((operations / _best(product, x, x[: self.width]), "dot"))
            a = np.asarray(x)
            found.append((operations / _best(np.matmul, a, a[: self.width]), "NumPy, matmul"))
        return found

    def _integer_products(self) -> list[tuple[float, str]]:
        if not native.kernels():
            return []
        matrix, x = _quantized(self.width, self.width), _normal(_ROWS, self.width)
        step = jax.jit(lambda x, w: quantized_matmul(x, w, numerics=_numerics()))
        return [(2 * _ROWS * self.width**2 / _best(step, x, matrix), f"quantized_matmul, {_ROWS} rows")]


def _numerics() -> Numerics:
    return Numerics(backend=native.resolve_backend("auto"))


def _available_memory() -> int:
    """Bytes on the device that nothing holds, or on the host that processes can get."""
    if stats := jax.local_devices()[0].memory_stats():
        return stats["bytes_limit"] - stats["bytes_in_use"]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read(part: np.ndarray) -> float:
    return float(part.sum())


def _normal(*shape: int) -> Array:
    """Rows of which no two are alike: the kernels compute those once."""
    return jax.random.normal(jax.random.key(0), shape)


def _quantized(d_in: int, d_out: int) -> QuantizedTensor:
    form = PLANE_FORMATS[GGMLType.Q8_0]
    data = jnp.full((d_out // PANEL, panel_bytes(d_in, form)), 17, jnp.uint8)  # as a scale, 17 twice is 6.5e-4
    return QuantizedTensor(data=data, shape=(d_in, d_out // PANEL * PANEL), format=form)


def _best(function: Callable[..., Any], *args: Any) -> float:
    """Seconds of the fastest call."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return min(times)
