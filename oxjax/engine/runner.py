"""The device side of the engine: builds batches in a few fixed shapes, runs the jitted step, owns the state."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence as Seq
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from oxjax.batch import Batch
from oxjax.cache.blocks import NULL_PAGE
from oxjax.cache.transfer import export_pages, gather_pages, import_pages, page_bucket, scatter_pages
from oxjax.config import ModelConfig
from oxjax.engine.scheduler import Work
from oxjax.kernels.dot import ROW_TILE
from oxjax.models.decoder import Params, init_state, step
from oxjax.sampling.params import SamplingParams
from oxjax.sampling.pipeline import Sampled, SamplingRows, sample

log = logging.getLogger("oxjax")


def row_buckets(max_rows: int, *, exact: bool) -> tuple[int, ...]:
    """Numbers of rows that steps are compiled for: powers of two, in exact mode whole row tiles."""
    sizes = [ROW_TILE if exact else 1]
    while sizes[-1] < max_rows:
        sizes.append(sizes[-1] * 2)
    return tuple(sizes)


class Runner:
    """Runs scheduled work. Every shape it uses follows from a row bucket, so shapes are few and known.

    Args:
        config: static.
        params: on the device.
        n_pages: pages of the pool, the null page included.
        page_size: tokens of a page.
        max_batch: sequences of a step.
        max_rows: rows of a step.
        max_context: tokens of a sequence; gives the width of block tables.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        n_pages: int,
        page_size: int,
        max_batch: int,
        max_rows: int,
        max_context: int,
    ):
        self.config, self.params, self.max_batch = config, params, max_batch
        self.state = init_state(config, n_pages=n_pages, page_size=page_size)
        self.buckets = row_buckets(max_rows, exact=config.exact)
        self.table_width = -(-max_context // page_size)
        self.compilations: Counter[str] = Counter()
        self._step = jax.jit(partial(step, config=config), donate_argnums=1)
        self._sample = jax.jit(partial(sample, exact=config.exact), static_argnames="n_top")

    def run(self, work: Seq[Work]) -> Float[Array, "N vocab"]:
        """Run the rows of `work` and return logits on the device.

        The logits have a row per piece of work, its last, or, if any piece wants all its logits, a row per
        row of the batch. Rows beyond are padding.
        """
        n_rows = sum(w.n_rows for w in work)
        bucket = next(b for b in self.buckets if b >= n_rows)
        all_logits = any(w.sequence.all_logits for w in work)
        return self._run_batch(_build(work, self._shapes(bucket, all_logits), all_logits=all_logits))

    def _shapes(self, bucket: int, all_logits: bool) -> dict[str, tuple[int, ...]]:
        n_seqs = min(bucket, self.max_batch)
        return {
            "tokens": (bucket,),
            "positions": (bucket,),
            "cu_q_lens": (n_seqs + 1,),
            "kv_lens": (n_seqs,),
            "block_tables": (n_seqs, self.table_width),
            "read_slots": (n_seqs,),
            "write_slots": (n_seqs,),
            "logits_rows": (bucket if all_logits else n_seqs,),
        }

    def _run_batch(self, arrays: dict[str, np.ndarray]) -> Array:
        with self._counted(self._step, f"step of {len(arrays['tokens'])} rows, {len(arrays['logits_rows'])} logits"):
            logits, self.state = self._step(self.params, self.state, Batch(**jax.device_put(arrays)))
        return logits

    def sample(
        self, logits: Float[Array, "N vocab"], rows: Seq[tuple[SamplingParams, int, int] | None], n_top: int
    ) -> Sampled:
        """Choose tokens for the rows of logits.

        Args:
            logits: from `run`.
            rows: parameters, seed and position for each row, in order; None for rows that need no token.
            n_top: the most likely tokens to report; rounded up to a power of two.
        """
        n_top = min(1 << (n_top - 1).bit_length() if n_top else 0, self.config.vocab_size)
        with self._counted(self._sample, f"sampling of {logits.shape[0]} rows, {n_top} most likely"):
            return self._sample(logits, _sampling_rows(rows, logits.shape[0]), n_top=n_top)

    def export_rows(self, pages: Seq[int], n_tokens: int) -> list[np.ndarray]:
        """Keys and values of the first `n_tokens` tokens in these pages, on the host; see `export_pages`."""
        with self._counted(gather_pages, f"export of {page_bucket(len(pages))} pages"):
            return export_pages(self.state, pages, n_tokens)

    def import_rows(self, pages: Seq[int], rows: Seq[np.ndarray]) -> None:
        """Fill pages with what `export_rows` gave; see `import_pages`."""
        with self._counted(scatter_pages, f"import of {page_bucket(len(pages))} pages"):
            self.state = import_pages(self.state, pages, rows)

    def warm_up(self, *, n_top: int = 0, all_logits: bool = False) -> None:
        """Compile every shape that `run`, `sample` and preemption can meet, on batches of padding.

        Args:
            n_top: also for this many reported tokens.
            all_logits: also for requests that want the logits of every row.
        """
        for bucket in self.buckets:
            for wanted in (False, True) if all_logits else (False,):
                shapes = self._shapes(bucket, wanted)
                logits = self._run_batch({name: np.zeros(shape, np.int32) for name, shape in shapes.items()})
                if not wanted:
                    for n in {0, n_top}:
                        self.sample(logits, [], n)
        for n_pages in (1 << i for i in range(page_bucket(self.table_width).bit_length())):
            self.import_rows([NULL_PAGE] * n_pages, self.export_rows([NULL_PAGE] * n_pages, 1))

    def _counted(self, function: jax.stages.Wrapped, cause: str) -> _CountCompilations:
        return _CountCompilations(function, cause, self.compilations)


class _CountCompilations:
    """Counts and logs a compilation of a jitted function inside a `with` block, under its cause."""

    def __init__(self, function: jax.stages.Wrapped, cause: str, counts: Counter[str]):
        self.function, self.cause, self.counts = function, cause, counts

    def __enter__(self) -> None:
        self.before = self.function._cache_size()

    def __exit__(self, *_: object) -> None:
        if self.function._cache_size() != self.before:
            self.counts[self.cause] += 1
            log.info("compiled: first %s", self.cause)


def _build(work: Seq[Work], shapes: dict[str, tuple[int, ...]], *, all_logits: bool) -> dict[str, np.ndarray]:
    """The batch of some work, as int32 NumPy arrays of the given shapes."""
    batch = {name: np.zeros(shape, np.int32) for name, shape in shapes.items()}
    row = 0
    for s, (sequence, start, n_rows) in enumerate(work):
        stop = start + n_rows
        batch["tokens"][row : row + n_rows] = sequence.tokens[start:stop]
        batch["positions"][row : row + n_rows] = np.arange(start, stop)
        batch["kv_lens"][s] = stop
        batch["block_tables"][s, : len(sequence.pages)] = sequence.pages
        row += n_rows
        batch["cu_q_lens"][s + 1] = row
    batch["cu_q_lens"][len(work) + 1 :] = row
    if all_logits:
        batch["logits_rows"][:] = np.arange(len(batch["tokens"]))
    else:
        batch["logits_rows"][: len(work)] = batch["cu_q_lens"][1 : len(work) + 1] - 1
    return batch


def _sampling_rows(rows: Seq[tuple[SamplingParams, int, int] | None], n: int) -> SamplingRows:
    """Parameters of the rows as arrays of `n`; rows without any are greedy."""
    columns = {
        "seeds": np.zeros((n, 2), np.uint32),
        "positions": np.zeros(n, np.int32),
        "temperature": np.zeros(n, np.float32),
        "top_k": np.zeros(n, np.int32),
        "top_p": np.ones(n, np.float32),
        "min_p": np.zeros(n, np.float32),
    }
    for i, row in enumerate(rows):
        if row is not None:
            params, seed, position = row
            columns["seeds"][i] = seed >> 32, seed & 0xFFFFFFFF
            columns["positions"][i] = position
            for name in ("temperature", "top_k", "top_p", "min_p"):
                columns[name][i] = getattr(params, name)
    return SamplingRows(**{name: jnp.asarray(column) for name, column in columns.items()})
