"""Code in the documentation runs, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

from oxjax import LLM
from oxjax.evaluate import run
from oxjax.models.architectures import architecture_names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list:
    """Code blocks of all pages as (page, line of the first line, text)."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for block in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, block.start(1)) + 1
            found.append(pytest.param(page, line, block[1], id=f"{page.relative_to(ROOT)}:{line}"))
    assert found
    return found


@pytest.mark.parametrize(("page", "line", "code"), blocks("python"))
def test_python_blocks_run(page, line, code):
    exec(compile("\n" * (line - 1) + code, page, "exec"), {"__name__": "__main__"})


def test_requests_run(tmp_path):
    pages = "".join(page.read_text() for page in PAGES)
    (tmp_path / "requests.jsonl").write_text(re.search(r"<< 'EOF'\n(.*?)\nEOF\n", pages, re.DOTALL)[1])
    with LLM() as llm:
        summary = run(llm, tmp_path / "requests.jsonl", tmp_path / "results.jsonl")
    assert (summary.done, summary.failed) == (4, 0)


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as forges make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("*.md")], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_the_parity_table_names_every_architecture():
    table = (ROOT / "docs" / "proof.md").read_text().split("<!-- parity table -->")[1]
    assert sorted(re.findall(r"([\w-]+) \| (?:\d\.\de-\d+|-) ", table)) == architecture_names()


NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
SMALL = "01_quickstart.ipynb"


# CI runs all of them, as `tools/notebooks.py --check`.
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == SMALL else pytest.mark.slow) for n in NOTEBOOKS])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the notebook machinery, not ours
def test_notebooks_print_what_is_stored(name):
    from tools.notebooks import differences  # imports the kernels

    assert differences(ROOT / "notebooks" / name) == []
