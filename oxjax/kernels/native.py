"""Kernels in C++ (`cpu/`), compiled by the machine that runs them.

They are compiled at their first use, not with the package: a build would need jaxlib's headers in its isolated
environment, would tie a wheel to one jaxlib, and could not know the processor. It takes some seconds, once: the library
is kept beside XLA's compiled programs, under a name made of all that it depends on. Without a compiler there are no
kernels, and XLA does the work.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jaxlib

from oxjax.errors import BackendUnavailableError, ModelError
from oxjax.kernels.numerics import BACKENDS

log = logging.getLogger("oxjax")
_SOURCES = Path(__file__).parent / "cpu"
# Multiplications and additions stay apart, or their bits would depend on the processor.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-w")
_GLUE = "ffi_"  # such files have no loops that take time, but as many templates as all kernels together
_COMPILERS = ("c++", "g++", "clang++")
_TARGETS = (
    "oxjax_dot_heads",
    "oxjax_float_matmul",
    "oxjax_grouped_matmul",
    "oxjax_gumbel_max",
    "oxjax_keep_largest",
    "oxjax_linear_scan",
    "oxjax_paged_attention",
    "oxjax_quantized_matmul",
    "oxjax_rotate",
    "oxjax_row_best",
    "oxjax_row_norm",
    "oxjax_row_sum",
)
_lock = threading.Lock()


class _NoKernelsError(Exception):
    """Why there are none."""


def kernels() -> str | None:
    """The instructions that the kernels use, or None where there are none and XLA must do."""
    return _state()[0]


def resolve_backend(backend: str) -> str:
    """The backend that a model is computed with: "auto" is "native" wherever there are kernels, else "xla".

    Raises:
        BackendUnavailableError: "native" was asked for, and there are no kernels.
        ModelError: an unknown name.
    """
    if backend not in ("auto", *BACKENDS):
        raise ModelError(f"backend {backend!r} is not one of auto, {', '.join(BACKENDS)}")
    if backend == "auto":
        return "native" if kernels() else "xla"
    if backend == "native":
        _require_kernels()
    return backend


def ffi_call(kernel: str, results: Any, **options: Any) -> Callable[..., Any]:
    """`jax.ffi.ffi_call` of one of our kernels, which are loaded first if they are not yet.

    Raises:
        BackendUnavailableError: there are none.
    """
    _require_kernels()
    return jax.ffi.ffi_call(f"oxjax_{kernel}", results, **options)


def _require_kernels() -> None:
    instructions, reason = _state()
    if instructions is None:
        raise BackendUnavailableError(f'backend "native" cannot be used here: {reason}')


def describe() -> str:
    """One line about the kernels, for people."""
    instructions, reason = _state()
    return f"native, {instructions}" if instructions else f"XLA ({reason})"


def _state() -> tuple[str | None, str]:
    with _lock:
        return _load()


@cache
def _load() -> tuple[str | None, str]:
    """Instructions, or None and a reason."""
    try:
        if jax.default_backend() != "cpu":
            raise _NoKernelsError(f"no kernels for {jax.default_backend()}")
        library = _open(_cache_folder())
    except _NoKernelsError as reason:
        if jax.default_backend() == "cpu":
            log.warning("no native kernels, XLA computes everything, slower: %s", reason)
        return None, str(reason)
    for name in _TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    library.oxjax_instructions.restype = ctypes.c_char_p
    return library.oxjax_instructions().decode(), ""


def _cache_folder() -> Path:
    return Path.home() / ".cache" / "oxjax" / "kernels"


def _open(folder: Path) -> ctypes.CDLL:
    sources = sorted(_SOURCES.iterdir())
    key = hashlib.sha256(repr((_FLAGS, jaxlib.__version__, _processor(), platform.libc_ver())).encode())
    for source in sources:
        key.update(source.read_bytes())
    path = folder / f"{key.hexdigest()[:24]}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _compile(path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise _NoKernelsError(f"{path} cannot be used: {error}") from error


def _processor() -> str:
    """Instructions of the processor; machines with others may share the folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _compile(path: Path) -> None:
    """Compile to a file of our own, then give it its name: whoever comes at the same time sees all of it or none."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise _NoKernelsError(f"no C++ compiler: none of {', '.join(_COMPILERS)} is on the PATH")

    def run(*arguments: str) -> None:
        done = subprocess.run([*compiler.split(), *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise _NoKernelsError(f"{compiler} failed: {done.stderr.strip()[:500]}")

    log.info("compiling native kernels, once")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, ThreadPoolExecutor() as pool:
        objects = {source: str(Path(folder) / f"{source.stem}.o") for source in _SOURCES.glob("*.cpp")}
        includes = f"-I{jax.ffi.include_dir()}"

        def compile_one(source: Path) -> None:
            less = ("-O1",) if source.name.startswith(_GLUE) else ()
            run(*_FLAGS, *less, includes, "-c", str(source), "-o", objects[source])

        list(pool.map(compile_one, objects))
        made = Path(folder) / path.name
        run(*_FLAGS, "-shared", *objects.values(), "-o", str(made))
        made.replace(path)
