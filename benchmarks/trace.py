"""Where the time of some steps goes, from a trace of jax's profiler."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

_MEASURED = "measured"
_PROGRAM = (
    "ThunkExecutor::Execute"  # a compiled program on a CPU; what it runs lies inside, under the names of operations
)
_KERNEL = re.compile(r'%(\S+) = .*custom_call_target="(oxjax_\w+)"')
_CONTAINERS = ("while", "call", "conditional")  # operations whose time is that of others

Intervals = list[tuple[float, float]]


@contextmanager
def tracing(folder: str) -> Iterator[None]:
    """Write a trace of what runs inside."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python functions would be half of the time
    with jax.profiler.trace(folder, profiler_options=options), jax.profiler.TraceAnnotation(_MEASURED):
        yield


def summary(folder: str, n_top: int = 8) -> dict[str, Any]:
    """Seconds of native kernels, of what else compiled programs did, and of the host with no program running.

    Args:
        folder: where `tracing` wrote a trace.
        n_top: operations to name.

    Returns:
        `seconds` in all, those of `kernels`, `xla` and `host`, and `top`: (operation, seconds, how often), the kinds
        that took most. Operations that ran at the same time count once, except in `top`.
    """
    (path,) = Path(folder).rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    spans = [e for e in events if e.get("ph") == "X"]
    (whole,) = ((e["ts"], e["ts"] + e["dur"]) for e in spans if e["name"] == _MEASURED)
    devices = {pid for pid, name in processes.items() if name.startswith("/device:")}
    operations = [e for e in spans if "hlo_op" in e.get("args", {}) and not e["name"].startswith(_CONTAINERS)]
    if devices:
        operations = [e for e in operations if e["pid"] in devices]
        running = operations
    else:
        # What a program hands to another thread may go on when the program's own span has ended.
        running = operations + [e for e in spans if e["name"] == _PROGRAM]
    names = _kernel_names()
    kernels = _length(_within(whole, (e for e in operations if _place(e) in names)))
    busy = _length(_within(whole, running))
    seconds, times = Counter(), Counter()
    for event in operations:
        kind = names.get(_place(event)) or re.sub(r"\.\d+$", "", event["name"])
        seconds[kind] += event["dur"] / 1e6
        times[kind] += 1
    wall = (whole[1] - whole[0]) / 1e6
    return {
        "seconds": wall,
        "kernels": kernels,
        "xla": busy - kernels,
        "host": wall - busy,
        "top": [(name, taken, times[name]) for name, taken in seconds.most_common(n_top)],
    }


def _place(event: dict[str, Any]) -> tuple[str, str]:
    return event["args"].get("hlo_module", ""), event["name"]


def _kernel_names() -> dict[tuple[str, str], str]:
    """The native kernel behind an operation of a module; programs of one name call the same ones in the same order."""
    names = {}
    for program in jax.devices()[0].client.live_executables():
        for module in program.hlo_modules():
            for operation, target in _KERNEL.findall(module.to_string()):
                names[module.name, operation] = target
    return names


def _within(whole: tuple[float, float], events: Iterable[dict[str, Any]]) -> Intervals:
    cut = ((max(e["ts"], whole[0]), min(e["ts"] + e["dur"], whole[1])) for e in events)
    return sorted((start, end) for start, end in cut if start < end)


def _length(intervals: Intervals) -> float:
    """Seconds that at least one of these intervals of microseconds covers; they are in order."""
    total, reached = 0.0, float("-inf")
    for start, end in intervals:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e6
