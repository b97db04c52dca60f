"""First lines of docstrings say what a thing is or does, in words that a reader would search for."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "oxjax"
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@pytest.mark.parametrize("room", sorted({p.relative_to(PACKAGE).parts[0] for p in PACKAGE.rglob("*.py")}))
def test_no_docstring_begins_as_a_clause(room):
    path = PACKAGE / room
    found = []
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
            if text and re.match(r"(What|How|Which|Whether|Of|From)\b", text):
                found.append(f"{file.name}: {text.splitlines()[0]}")
    assert not found
