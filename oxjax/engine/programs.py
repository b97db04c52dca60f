"""The programs that the device runs, compiled once per config and shape, whichever runner comes first."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from oxjax.batch import Batch
from oxjax.cache.allocator import NULL_PAGE
from oxjax.config import ModelConfig
from oxjax.engine.decode import decode_steps
from oxjax.engine.scheduler import ScheduledChunk
from oxjax.kernels.dot import min_rows
from oxjax.kernels.numerics import Numerics
from oxjax.kernels.row_best import row_best
from oxjax.models.decoder import EngineState, Params, hidden_states, logits_of, step
from oxjax.sampling.pipeline import report

log = logging.getLogger("oxjax")
SCORED_ROWS = 64  # whose logits are there at once


class BatchShape(NamedTuple):
    """Sizes of a batch's arrays."""

    n_rows: int
    n_seqs: int
    table_width: int
    n_logits: int

    def arrays(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array of a `Batch`."""
        n_rows, n_seqs, table_width, n_logits = self
        return {
            "tokens": (n_rows,),
            "positions": (n_rows,),
            "cu_q_lens": (n_seqs + 1,),
            "kv_lens": (n_seqs,),
            "block_tables": (n_seqs, table_width),
            "read_slots": (n_seqs,),
            "write_slots": (n_seqs,),
            "logits_rows": (n_logits,),
        }


def n_numbers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Total size of arrays of these shapes."""
    return sum(map(math.prod, shapes.values()))


def split(flat: Int[Any, " n"], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Arrays of these shapes, one after the other in `flat`: views of a NumPy array, or parts of a traced one."""
    ends = accumulate(map(math.prod, shapes.values()))
    return {n: flat[end - math.prod(s) : end].reshape(s) for (n, s), end in zip(shapes.items(), ends, strict=True)}


_jit_batch = partial(jax.jit, static_argnames=("shape", "config"), donate_argnames="state")


@_jit_batch
def batch_logits(
    params: Params, state: EngineState, packed: Int[Array, " n"], *, shape: BatchShape, config: ModelConfig
) -> tuple[Float[Array, "N vocab"], EngineState]:
    """`step` of a packed `Batch`."""
    return step(params, state, Batch(**split(packed, shape.arrays())), config)


@_jit_batch
def batch_hidden(
    params: Params, state: EngineState, packed: Int[Array, " n"], *, shape: BatchShape, config: ModelConfig
) -> tuple[Float[Array, "N d_model"], EngineState]:
    """`hidden_states` of a packed `Batch`."""
    return hidden_states(params, state, Batch(**split(packed, shape.arrays())), config)


logits_of_hidden = jax.jit(logits_of, static_argnames="config")
decode = jax.jit(decode_steps, static_argnames=("config", "n_top", "bucket"), donate_argnames="state")


@jax.jit
def take_rows(array: Float[Array, "N d"], rows: Int[Array, " n"]) -> Float[Array, "n d"]:
    """These rows of an array."""
    return array[rows]


def whole_blocks(n_rows: int) -> int:
    """So many rows, or more, in blocks of `SCORED_ROWS`."""
    return -(-n_rows // SCORED_ROWS) * SCORED_ROWS


@partial(jax.jit, static_argnames=("config", "n_top"))
def scores(
    params: Params,
    hidden: Float[Array, "n d_model"],
    targets: Int[Array, " n"],
    n_wanted: Int[Array, ""],
    *,
    config: ModelConfig,
    n_top: int,
) -> dict[str, Array]:
    """Log-probabilities of tokens after rows with these hidden states; see `Runner.score`.

    Args:
        params: of the model.
        hidden: states of the rows, up to `SCORED_ROWS` or a multiple of it.
        targets: the token wanted of each.
        n_wanted: how many rows count; what the others give means nothing.
        config: static.
        n_top: the most likely tokens to report.
    """
    n = min(len(hidden), SCORED_ROWS)
    rows, tokens_of = hidden.reshape(-1, n, hidden.shape[1]), targets.reshape(-1, n)

    def score(i: Int[Array, ""]) -> dict[str, Array]:
        tokens = tokens_of[i]
        logits = logits_of(params, rows[i], config)
        _, largest, log_sum = row_best(logits, numerics=config.numerics)
        found = report(logits, tokens, largest, log_sum, n_top=n_top, ranks=True)
        return {**found._asdict(), "finite": jnp.isfinite(log_sum)}

    def put(i: Int[Array, ""], found: dict[str, Array]) -> dict[str, Array]:
        return jax.tree.map(lambda a, part: lax.dynamic_update_index_in_dim(a, part, i, 0), found, score(i))

    block = jax.eval_shape(score, jnp.int32(0))
    found = jax.tree.map(lambda a: jnp.zeros((len(rows), *a.shape), a.dtype), block)
    found = lax.fori_loop(0, (n_wanted + n - 1) // n, put, found)
    return jax.tree.map(lambda a: a.reshape(len(hidden), *a.shape[2:]), found)


def row_buckets(max_rows: int, numerics: Numerics) -> tuple[int, ...]:
    """Numbers of rows that steps are compiled for: powers of two, from what a product takes at least."""
    sizes = [min_rows(numerics)]
    while sizes[-1] < max_rows:
        sizes.append(sizes[-1] * 2)
    return tuple(sizes)


class CountCompilations:
    """Counts and logs a compilation of a jitted function inside a `with` block, under its cause."""

    def __init__(self, function: jax.stages.Wrapped, cause: str, counts: Counter[str]):
        self.function, self.cause, self.counts = function, cause, counts

    def __enter__(self) -> None:
        self.before = self.function._cache_size()

    def __exit__(self, *_: object) -> None:
        if self.function._cache_size() != self.before:
            self.counts[self.cause] += 1
            log.info("compiled: first %s", self.cause)


def build_batch(work: Seq[ScheduledChunk], shape: BatchShape, *, all_logits: bool) -> Int[np.ndarray, " n"]:
    """The batch of some work, its arrays in one."""
    shapes = shape.arrays()
    packed = np.zeros(n_numbers(shapes), np.int32)
    batch = split(packed, shapes)
    row = 0
    for s, (sequence, start, n_rows) in enumerate(work):
        stop = start + n_rows
        batch["tokens"][row : row + n_rows] = sequence.tokens[start:stop]
        batch["positions"][row : row + n_rows] = np.arange(start, stop)
        batch["kv_lens"][s] = stop
        state = sequence.state
        batch["block_tables"][s, : len(state.pages)] = state.pages
        batch["read_slots"][s] = state.slot or NULL_PAGE
        batch["write_slots"][s] = state.next_slot or NULL_PAGE
        row += n_rows
        batch["cu_q_lens"][s + 1] = row
    batch["cu_q_lens"][len(work) + 1 :] = row
    if all_logits:
        batch["logits_rows"][:] = np.arange(len(batch["tokens"]))
    else:
        batch["logits_rows"][: len(work)] = batch["cu_q_lens"][1 : len(work) + 1] - 1
    return packed
