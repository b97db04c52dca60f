"""Engines in processes of their own, so that none uses another's threads or memory, and each can start afresh.

A worker answers a JSON line for each JSON line it is asked: a method of its engine, and the arguments.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]


class WorkerError(RuntimeError):
    """A worker could not do what it was asked, or died."""


class Worker:
    """A process that holds one engine. Use as a context manager.

    Args:
        module: that has the engine's class, `Engine`.
        options: keyword arguments of the class.
        threads: processors that the process may use.
        environment: variables beside ours.

    Raises:
        WorkerError: the engine could not be made.
    """

    def __init__(self, module: str, options: dict[str, Any], threads: int, environment: dict[str, str] | None = None):
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path} | (environment or {}),
            text=True,
            encoding="utf-8",
        )
        try:
            self.ask("open", module, options, threads)
        except WorkerError:
            self.close()
            raise

    def ask(self, method: str, *args: Any) -> Any:
        """What a method of the engine returns."""
        try:
            self._process.stdin.write(json.dumps([method, *args]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"a worker died in {method} with exit status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["ok"]

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def usable_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _open(module: str, options: dict[str, Any], threads: int) -> Any:
    if hasattr(os, "sched_setaffinity"):  # before anything counts the processors to start as many threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    return importlib.import_module(module).Engine(threads=threads, **options)


def _peak_memory() -> int:
    """Bytes. A process starts with its parent's peak, so the parent must be small: it imports no engine."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _serve() -> None:
    # What engines print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    engine: Any = None
    for line in sys.stdin:
        method, *args = json.loads(line)
        try:
            if method == "open":
                engine, result = _open(*args), None
            elif method == "peak_memory":
                result = _peak_memory()
            else:
                result = getattr(engine, method)(*args)
            answer = {"ok": result}
        except Exception as error:  # whatever it is, the one who asked decides what it means
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
    os._exit(0)  # llama.cpp's binding can crash when it cleans up
