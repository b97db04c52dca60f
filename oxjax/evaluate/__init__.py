"""Evaluations: files of requests, scores, and lm-evaluation-harness."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oxjax.evaluate.batch import Progress, Summary, run
    from oxjax.evaluate.tables import table
    from oxjax.evaluate.verification import Verification, verify

_HOMES = {
    "Progress": "oxjax.evaluate.batch",
    "Summary": "oxjax.evaluate.batch",
    "Verification": "oxjax.evaluate.verification",
    "run": "oxjax.evaluate.batch",
    "table": "oxjax.evaluate.tables",
    "verify": "oxjax.evaluate.verification",
}

__all__ = ["Progress", "Summary", "Verification", "run", "table", "verify"]


def __getattr__(name: str) -> Any:  # at first use: these import `LLM`, and `LLM` imports from here
    if name not in _HOMES:
        raise AttributeError(f"module 'oxjax.evaluate' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
