"""oxjax: reproducible inference of GGUF language models on JAX.

The public names are imported when first used, so that `import oxjax` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oxjax.batch import Batch
    from oxjax.config import ModelConfig
    from oxjax.constrain import Grammar
    from oxjax.engine.beams import BeamParams
    from oxjax.engine.output import Chunk
    from oxjax.llm import LLM
    from oxjax.models.decoder import init_state, step
    from oxjax.models.load import Model, load
    from oxjax.results import Perplexity, Result, Score
    from oxjax.sampling.params import SamplingParams
    from oxjax.sampling.single import Sample, sample
    from oxjax.tokenizer import Tokenizer

__version__ = "0.1.0"

_HOMES = {
    "Batch": "oxjax.batch",
    "BeamParams": "oxjax.engine.beams",
    "Chunk": "oxjax.engine.output",
    "Grammar": "oxjax.constrain",
    "LLM": "oxjax.llm",
    "Model": "oxjax.models.load",
    "ModelConfig": "oxjax.config",
    "Perplexity": "oxjax.results",
    "Result": "oxjax.results",
    "Sample": "oxjax.sampling.single",
    "SamplingParams": "oxjax.sampling.params",
    "Score": "oxjax.results",
    "Tokenizer": "oxjax.tokenizer",
    "init_state": "oxjax.models.decoder",
    "load": "oxjax.models.load",
    "sample": "oxjax.sampling.single",
    "step": "oxjax.models.decoder",
}

__all__ = [
    "LLM",
    "Batch",
    "BeamParams",
    "Chunk",
    "Grammar",
    "Model",
    "ModelConfig",
    "Perplexity",
    "Result",
    "Sample",
    "SamplingParams",
    "Score",
    "Tokenizer",
    "init_state",
    "load",
    "sample",
    "step",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'oxjax' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
