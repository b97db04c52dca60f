"""Evaluations: files of requests, scores, and other people's harnesses."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Progress": "oxjax.evaluate.batch",
    "Summary": "oxjax.evaluate.batch",
    "run": "oxjax.evaluate.batch",
    "table": "oxjax.evaluate.tables",
    "Verification": "oxjax.evaluate.verification",
    "verify": "oxjax.evaluate.verification",
}


def __getattr__(name: str) -> Any:  # when it is used: these import `LLM`, and `LLM` imports from here
    if name not in _HOMES:
        raise AttributeError(f"module 'oxjax.evaluate' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
