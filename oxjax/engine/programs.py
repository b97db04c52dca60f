"""The programs that the device runs, compiled once per config and shape, whichever runner comes first."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence as Seq
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from oxjax.batch import Batch
from oxjax.cache.allocator import NULL_PAGE
from oxjax.config import ModelConfig
from oxjax.engine.decode import decode_steps
from oxjax.engine.packed import Room, n_numbers, sampling_record, sampling_rows, split, unpack
from oxjax.engine.scheduler import Work
from oxjax.kernels.dot import least_rows
from oxjax.kernels.row_best import row_best
from oxjax.models.decoder import EngineState, Params, hidden_states, logits_of, step
from oxjax.sampling.pipeline import Sampled, report, sample

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
decode = jax.jit(decode_steps, static_argnames=("config", "n_top", "room"), donate_argnames="state")


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
    """How likely tokens are after rows with these hidden states; see `Runner.score`.

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
        _, largest, log_sum = row_best(logits, exact=config.exact)
        logprobs, ranks, top_tokens, top_logprobs = report(logits, tokens, largest, log_sum, n_top=n_top, ranks=True)
        return {
            "logprobs": logprobs,
            "ranks": ranks,
            "top_tokens": top_tokens,
            "top_logprobs": top_logprobs,
            "finite": jnp.isfinite(log_sum),
        }

    def put(i: Int[Array, ""], found: dict[str, Array]) -> dict[str, Array]:
        return jax.tree.map(lambda a, part: lax.dynamic_update_index_in_dim(a, part, i, 0), found, score(i))

    block = jax.eval_shape(score, jnp.int32(0))
    found = jax.tree.map(lambda a: jnp.zeros((len(rows), *a.shape), a.dtype), block)
    found = lax.fori_loop(0, (n_wanted + n - 1) // n, put, found)
    return jax.tree.map(lambda a: a.reshape(len(hidden), *a.shape[2:]), found)


@partial(jax.jit, static_argnames=("n_top", "room", "exact"))
def choose(
    logits: Float[Array, "N vocab"],
    packed: Int[Array, "N words"],
    masks: UInt32[Array, "N mask_words"],
    *,
    n_top: int,
    room: Room,
    exact: bool,
) -> Sampled:
    """`sample` with packed parameters."""
    return sample(logits, sampling_rows(unpack(packed, sampling_record(room))), masks, n_top=n_top, exact=exact)


def row_buckets(max_rows: int, *, exact: bool) -> tuple[int, ...]:
    """Numbers of rows that steps are compiled for: powers of two, from what a product takes at least."""
    sizes = [least_rows(exact=exact)]
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


def build_batch(work: Seq[Work], shape: BatchShape, *, all_logits: bool) -> Int[np.ndarray, " n"]:
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
