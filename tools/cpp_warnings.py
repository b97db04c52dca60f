"""Compile our C++ with all warnings as errors.

python tools/cpp_warnings.py

Users' builds are silent (`-w`), because they use compilers that we do not know. XLA's headers are system headers here,
so they do not count. -Wpsabi is about passing vectors to functions; all of ours that do are inlined.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

ROOT = Path(__file__).parents[1]
CPU = ROOT / "oxjax" / "kernels" / "cpu"
FLAGS = ["-std=c++17", "-march=native", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fsyntax-only"]
PATHS = [f"-I{CPU}", "-isystem", jax.ffi.include_dir()]


def warnings(source: Path) -> str:
    """The compiler's messages about a source; empty if there are none."""
    return subprocess.run(["c++", *FLAGS, *PATHS, source], capture_output=True, text=True, check=False).stderr


def main() -> None:
    sources = [*CPU.glob("*.cpp"), *(ROOT / "tests" / "kernels").glob("*.cpp")]
    with ThreadPoolExecutor() as pool:
        found = "".join(pool.map(warnings, sources))
    print(found or f"{len(sources)} files without warnings", end="" if found else "\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
