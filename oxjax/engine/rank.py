"""Pairs of a query and a document: how they become one prompt, and how hidden states become scores."""

from __future__ import annotations

import re
from collections.abc import Sequence as Seq
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from oxjax.config import ModelConfig
from oxjax.errors import InvalidRequestError
from oxjax.gguf import GGUFFile
from oxjax.models.rank import RankHead, rank_scores
from oxjax.tokenizer import Tokenizer
from oxjax.tokenizer.guard import Guard

_KEY = "tokenizer.chat_template.rerank"
_ROWS = 32  # of a batch of scores; one shape for all

_scores = jax.jit(rank_scores, static_argnames="config")


def read_rerank_template(path: str | Path) -> str | None:
    """A GGUF file's template for pairs, with `{query}` and `{document}` in it; None where it has none."""
    with GGUFFile.open(Path(path)) as file:
        return file.get(_KEY, str, None)


class PairEncoder:
    """The ids of a query and a document together.

    Without a template they are `[BOS] query [EOS] [SEP] document [EOS]`, each of these as far as the vocabulary says
    that it is added. The last one is not SEP even where a tokenizer ends single texts with it, as in llama.cpp.

    Args:
        tokenizer: the model's.
        template: what `read_rerank_template` gives.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None):
        self._tokenizer, self._template, self._guard = tokenizer, template, Guard(tokenizer)

    def encode(self, query: str | list[int], document: str | list[int]) -> list[int]:
        """Ids of a pair; ids stand where their text would.

        Raises:
            InvalidRequestError: there is not one token.
        """
        ids = self._plain(query, document) if self._template is None else self._in_template(query, document)
        if not ids:
            raise InvalidRequestError("query and document are empty, and the model has no token to begin with")
        return ids

    def _plain(self, query: str | list[int], document: str | list[int]) -> list[int]:
        t = self._tokenizer
        eos = [t.sep_id if t.eos_id is None else t.eos_id] * t.add_eos
        parts = [t.bos_id] * t.add_bos, query, eos, [t.sep_id] * t.add_sep, document, eos
        encoded = (t.encode(p, add_special=False, parse_special=False) if isinstance(p, str) else p for p in parts)
        return [i for part in encoded for i in part if i is not None]

    def _in_template(self, query: str | list[int], document: str | list[int]) -> list[int]:
        sides, ids, text = {"{query}": query, "{document}": document}, [], ""
        for part in re.split(r"(\{query\}|\{document\})", self._template):
            side = sides.get(part, part)
            if isinstance(side, str):  # tokenised with what is around it, as tokens cross the borders
                text += self._guard.protect(side) if part in sides else part
            else:
                ids += self._guard.encode(text) + side
                text = ""
        return ids + self._guard.encode(text)


def score(
    p: RankHead, rows: Seq[Float[np.ndarray, " d_model"]], config: ModelConfig
) -> list[Float[np.ndarray, " labels"]]:
    """Float32 scores of each pooled hidden state, one for each label."""
    found: list[np.ndarray] = []
    for start in range(0, len(rows), _ROWS):
        part = np.stack(rows[start : start + _ROWS])
        padded = np.pad(part, ((0, _ROWS - len(part)), (0, 0)))
        found += list(np.asarray(_scores(p, jax.device_put(padded), config=config))[: len(part)])
    return found
