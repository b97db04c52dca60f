"""What the documents show is run as they show it."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from oxjax import LLM
from oxjax.evaluate import run
from oxjax.models.architectures import ARCHITECTURES

ROOT = Path(__file__).parents[1]


def test_the_readmes_python_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "notebooks").glob("*.ipynb")))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the notebook machinery, not ours
def test_notebooks_run(name):
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": ROOT}}).execute()


def test_the_parity_table_names_every_architecture():
    table = (ROOT / "README.md").read_text().split("<!-- parity table -->")[1]
    assert sorted(re.findall(r"([\w-]+) \| (?:\d\.\de-\d+|-) ", table)) == sorted(ARCHITECTURES)


def test_the_readmes_requests_run(tmp_path):
    lines = re.search(r"<< 'EOF'\n(.*?)\nEOF\n", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    (tmp_path / "requests.jsonl").write_text(lines)
    with LLM() as llm:
        summary = run(llm, tmp_path / "requests.jsonl", tmp_path / "results.jsonl")
    assert (summary.done, summary.failed) == (4, 0)
