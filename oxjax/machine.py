"""Memory for pages, threads, and the folder of compiled programs."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import jax
from jax._src import xla_bridge

from oxjax.errors import InvalidRequestError

_DEVICE_SHARE = 0.5  # of what an accelerator has free once the parameters are there
_HOST_SHARE = 0.1  # of a host's memory: others live there, and XLA touches all of a pool when it makes it


def pool_bytes() -> tuple[int, int]:
    """Bytes that the page pool takes at most unless one sequence needs more, and bytes that there are at all."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats["bytes_in_use"]
        return int(_DEVICE_SHARE * free), free
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(_HOST_SHARE * memory), memory


def use_threads(n: int) -> None:
    """Let `n` threads of the processor compute, in XLA and in our kernels, which share its pool.

    XLA makes the pool when jax first needs a device, and reads its size from the environment.

    Raises:
        InvalidRequestError: jax has begun already, with another number.
    """
    if n == _threads():
        return
    if xla_bridge.backends_are_initialized():
        raise InvalidRequestError(
            f"threads {n}: jax runs already with another number in this process; say it in the first LLM, or set NPROC"
        )
    os.environ["NPROC"] = str(n)


def _threads() -> int:
    """As many as XLA has, or will have."""
    if found := os.environ.get("NPROC"):
        return int(found)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def enable_compilation_cache() -> None:
    """Keep compiled programs between processes, unless the user has set jax up otherwise.

    Programs for CPUs are compiled for one set of instructions, so each set has a folder of its own.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = Path.home() / ".cache" / "oxjax" / "xla" / _processor()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:12]}"
