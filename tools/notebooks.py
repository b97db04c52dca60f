"""Execute notebooks, and store their outputs or compare them with the stored ones.

python tools/notebooks.py --write | --check [NOTEBOOK ...]

Text has to be the same; pictures are stored and not compared. Every bit of a number shows in hexadecimal floats and in
digests, so these are compared only on the kind of processor that a cell's metadata names (`processor`). So is all text
of a cell with the tag `processor`, which prints rounding errors. A cell with the tag `varies` prints versions or dates,
or what fast mode makes of timing, and its output is not compared.
"""

import argparse
import difflib
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from oxjax.kernels import native

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
BITS = re.compile(r"-?0x[01]\.[0-9a-f]+p[+-]\d+|(?<=digest )[0-9a-f]{8,}")
VARIES, ROUNDS = "varies", "processor"


def processor() -> str:
    """The kind of processor, as far as bits depend on it."""
    return f"{platform.machine()} {native.kernels() or 'without kernels'}"


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs, and without traces of this run."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": ROOT}})
    client.record_timing = False
    client.execute()
    for cell in code_cells(notebook):
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        cell.metadata.pop("processor", None)
        if BITS.search(text_of(cell)) or ROUNDS in cell.metadata.get("tags", ()):
            cell.metadata["processor"] = processor()
    notebook.metadata["language_info"] = {"name": "python"}  # else the version of this Python
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> Iterator[nbformat.NotebookNode]:
    return (cell for cell in notebook.cells if cell.cell_type == "code")


def text_of(cell: nbformat.NotebookNode) -> str:
    """Everything that a cell printed or returned, as text."""
    parts = []
    for output in cell.outputs:
        if output.output_type == "stream":
            parts.append(output.text)
        elif "image/png" not in output.get("data", {}):
            parts.append(output.get("data", {}).get("text/plain", "") + "\n")
    return "".join(parts)


def differences(path: Path) -> list[str]:
    """Lines of a diff between the stored text and that of a fresh run; none where they are the same."""
    stored, fresh = nbformat.read(path, as_version=4), executed(path)
    found: list[str] = []
    for i, (old, new) in enumerate(zip(code_cells(stored), code_cells(fresh), strict=True)):
        tags, elsewhere = old.metadata.get("tags", ()), old.metadata.get("processor", processor()) != processor()
        if VARIES in tags or (ROUNDS in tags and elsewhere):
            continue
        before, after = text_of(old), text_of(new)
        if elsewhere:
            before, after = BITS.sub("bits", before), BITS.sub("bits", after)
        name = f"{path.name}, code cell {i + 1}"
        found += difflib.unified_diff(
            before.splitlines(), after.splitlines(), f"{name}, stored", f"{name}, fresh", lineterm=""
        )
        if bool(old.outputs) != bool(new.outputs):
            found.append(f"{name}: outputs are {'missing' if new.outputs else 'new'}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="store the outputs of a fresh run")
    what.add_argument("--check", action="store_true", help="compare a fresh run with the stored outputs")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all")
    args = parser.parse_args()
    found: list[str] = []
    for path in args.notebooks or sorted(FOLDER.glob("*.ipynb")):
        print(path.name, file=sys.stderr)
        if args.write:
            nbformat.write(executed(path), path)
        else:
            found += differences(path)
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
