"""Counts the code that one token passes through: files, functions, and calls into another file.

python tools/trace_request.py [--list]

Traces `LLM.generate` of one token: the first call of a shape, which traces the model, and the second. Comprehensions
and lambdas count as part of the function that holds them. `--list` names the files and their functions.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1] / "oxjax"


def traced(run: Callable[[], Any]) -> tuple[dict[str, set[str]], int]:
    """Functions of the package by file, and the number of different calls from one file into another."""
    functions: dict[str, set[str]] = defaultdict(set)
    calls: set[tuple[str, str, str]] = set()

    def caller_of(frame: FrameType | None) -> str | None:
        while frame is not None:
            if frame.f_code.co_filename.startswith(str(PACKAGE)):
                return frame.f_code.co_filename
            frame = frame.f_back
        return None

    def watch(frame: FrameType, event: str, _: Any) -> None:
        file, name = frame.f_code.co_filename, frame.f_code.co_qualname
        if event != "call" or not file.startswith(str(PACKAGE)) or "<" in name.rpartition(".")[2]:
            return
        functions[file].add(name)
        caller = caller_of(frame.f_back)
        if caller is not None and caller != file:
            calls.add((caller, file, name))

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return functions, len(calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, str(PACKAGE.parent))
    from oxjax import LLM, SamplingParams  # noqa: PLC0415

    llm = LLM(max_context=256)
    params = SamplingParams(max_tokens=1, temperature=0.8, seed=1)
    _ = llm.engine
    for which in ("first", "second"):
        functions, n_calls = traced(lambda: llm.generate("Once upon a time", params))
        n_functions = sum(map(len, functions.values()))
        print(f"{which} call of a shape: {len(functions)} files, {n_functions} functions, {n_calls} calls across files")
        if args.list:
            for file, names in sorted(functions.items()):
                print(f"  {Path(file).relative_to(PACKAGE)}: {', '.join(sorted(names))}")


if __name__ == "__main__":
    main()
