"""Measure every architecture against llama.cpp, and put the table into docs/proof.md.

python tools/parity_table.py [--write]

Runs the parity tests of every architecture and collects their measurements: the largest difference of any logit (of any
hidden state, for encoders) over all ways of feeding the tokens, divided by the standard deviation. `-` marks
architectures that only other tests check.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from oxjax.models.architectures import architecture_names

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "proof.md"
MARK = "<!-- parity table -->"
TESTS = "test_logits_match or test_architecture or test_random_files or test_reference_files or test_random_encoders"
LINE = re.compile(r"parity (\S+) \((.*)\): (.*) of the (?:logits|hidden states)' std")
COLUMNS = 4


def measured() -> dict[str, float]:
    """Worst error by architecture: from the default tests, and from the slow ones for what those leave out."""
    worst = _run(TESTS, "not slow")
    if left := [name for name in architecture_names() if name not in worst]:
        worst |= _run(f"({TESTS}) and ({' or '.join(left)})", "slow")
    return worst


def _run(tests: str, marks: str) -> dict[str, float]:
    command = [sys.executable, "-m", "pytest", "-q", "tests/parity", "-m", marks, "-k", tests]
    run = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    worst: dict[str, float] = {}
    for architecture, _, figures in LINE.findall(run.stdout):
        worst[architecture] = max(worst.get(architecture, 0.0), *map(float, re.findall(r"\d\.\de-\d+", figures)))
    return worst


def table(errors: dict[str, float]) -> str:
    """Markdown, architectures down the columns."""
    cells = [f"{name} | {errors[name]:.1e}" if name in errors else f"{name} | -" for name in architecture_names()]
    cells += [" | "] * (-len(cells) % COLUMNS)
    height = len(cells) // COLUMNS
    rows = [" | ".join(cells[i::height]) for i in range(height)]
    head = " | ".join(["architecture | error"] * COLUMNS)
    return "\n".join(f"| {row} |" for row in (head, " | ".join(["---"] * 2 * COLUMNS), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the table in docs/proof.md")
    args = parser.parse_args()
    text = table(measured())
    print(text)
    if args.write:
        before, _, after = PAGE.read_text().split(MARK)
        PAGE.write_text(f"{before}{MARK}\n{text}\n{MARK}{after}")


if __name__ == "__main__":
    main()
