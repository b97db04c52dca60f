"""Run one of n shards of the slow tests.

python tools/slow_shards.py I/N [arguments of pytest ...]

Every n-th slow test is in a shard, so tests of one file, which take alike long, are spread over all of them.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTEST = [sys.executable, "-m", "pytest"]


def slow_tests() -> list[str]:
    """Ids of the slow tests, in the order of their files."""
    command = [*PYTEST, "--collect-only", "-q", "-m", "slow"]
    listed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return [line for line in listed.stdout.splitlines() if re.match(r"tests/\S+\.py::", line)]


def main() -> None:
    shard = re.fullmatch(r"(\d+)/(\d+)", sys.argv[1] if len(sys.argv) > 1 else "")
    if shard is None or not 1 <= int(shard[1]) <= int(shard[2]):
        sys.exit(__doc__)
    tests = slow_tests()[int(shard[1]) - 1 :: int(shard[2])]
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as ids:  # more than a command line may hold
        ids.write("\n".join(tests))
        ids.flush()
        sys.exit(
            subprocess.run([*PYTEST, "-m", "slow", *sys.argv[2:], f"@{ids.name}"], cwd=ROOT, check=False).returncode
        )


if __name__ == "__main__":
    main()
