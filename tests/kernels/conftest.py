"""Sweeps over sizes keep their first and last case by default, since XLA compiles each case anew.

Long ones on the native backend also keep the middle. The other cases are slow tests;
`check_*.cpp` sweep native sizes as well.
"""

from collections import defaultdict
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def is_size(value):
    return type(value) is int or (type(value) is tuple and all(type(part) is int for part in value))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    sweeps = defaultdict(list)
    for item in items:
        if item.path.parent == HERE and hasattr(item, "callspec"):
            params = item.callspec.params
            kinds = {name: str(value) for name, value in params.items() if not is_size(value)}
            if len(kinds) < len(params):
                sweeps[item.path, item.originalname, *kinds.items()].append(item)
    for sweep in sweeps.values():
        kept = {0, len(sweep) - 1}
        if len(sweep) > 4 and "xla" not in sweep[0].callspec.params.values():
            kept.add(len(sweep) // 2)
        for i, item in enumerate(sweep):
            if i not in kept:
                item.add_marker("slow")
