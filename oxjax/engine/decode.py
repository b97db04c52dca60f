"""Several decode steps in one call of the device: what is chosen goes back in as the next input, without the host."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Int

from oxjax.batch import Batch
from oxjax.config import ModelConfig
from oxjax.engine.config import MAX_STEPS
from oxjax.models.decoder import EngineState, Params, step
from oxjax.sampling.packing import SamplingBucket, n_words, sampling_record, sampling_rows, unpack
from oxjax.sampling.pipeline import Sampled, SamplingRows, sample


@struct.dataclass
class DecodeRows:
    """A row for each sequence that decodes, `[S]` each; rows past the last sequence are zeros.

    Attributes:
        sampling: how the row's tokens are chosen. The positions are those of the first one chosen.
        tokens: last id of each sequence, the first input.
        n_steps: most steps for the row.
        stops_at_eos: end-of-generation tokens end the row.
        breaks_loop: the call ends with this row instead of going on for the others.
        read_slots: slot with the recurrent state before the first step, as in `Batch`.
        write_slots: slot for the state after every step; not one that is read.
        block_tables: pages for all steps, `[S, P]`.
    """

    sampling: SamplingRows
    tokens: Int[Array, " S"]
    n_steps: Int[Array, " S"]
    stops_at_eos: Bool[Array, " S"]
    breaks_loop: Bool[Array, " S"]
    read_slots: Int[Array, " S"]
    write_slots: Int[Array, " S"]
    block_tables: Int[Array, "S P"]


@struct.dataclass
class Decoded:
    """Tokens of several decode steps.

    Attributes:
        n_steps: number of steps that ran.
        chosen: as of `sample`, with a leading axis of `MAX_STEPS` steps. Entries past `n_steps` mean nothing, nor do
            those after the end of a row.
    """

    n_steps: Int[Array, ""]
    chosen: Sampled


@cache
def decoding_record(bucket: SamplingBucket) -> np.dtype:
    """The type of a decoding row's record, whose fields are those of `DecodeRows` without the block table."""
    integers = ("tokens", "n_steps", "stops_at_eos", "breaks_loop", "read_slots", "write_slots")
    return np.dtype([("sampling", sampling_record(bucket)), *((name, np.int32) for name in integers)])


def unpack_rows(packed: Int[Array, "S words"], bucket: SamplingBucket) -> DecodeRows:
    """The `DecodeRows` of `decoding_record`s with a block table after each."""
    record = decoding_record(bucket)
    fields = unpack(packed, record)
    flags = {name: fields.pop(name) > 0 for name in ("stops_at_eos", "breaks_loop")}
    sampling = sampling_rows(fields.pop("sampling"))
    return DecodeRows(sampling=sampling, block_tables=packed[:, n_words(record) :], **fields, **flags)


def _isolate(always: Bool[Array, ""], fn: Callable[[], Any]) -> Any:
    """Compute `fn` in a branch of its own, into which the compiler merges nothing, as if it were a program.

    Merged with what makes the logits, the sampler would round otherwise. A barrier is gone before the compiler merges.
    """
    nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(fn))
    return lax.cond(always, fn, lambda: nothing)


def decode_steps(
    params: Params,
    state: EngineState,
    packed: Int[Array, "S words"],
    end_ids: Int[Array, " E"],
    *,
    config: ModelConfig,
    n_top: int,
    bucket: SamplingBucket,
) -> tuple[Decoded, EngineState]:
    """Decode until all rows have ended, or one that ends the call. Pure, as `step` is; jit it in the same way.

    A row ends when it has taken its steps, chosen a token that ends it, or met logits that are not finite. While
    others go on it repeats its last step, which changes nothing but recurrent states, of sequences that are over.

    Args:
        params: the model's numbers.
        state: one entry per layer. The first step reads the read slots; it and all others write the write slots, so
            that a call can be run again.
        packed: a `decoding_record` and a block table for each sequence. How many steps is part of it, so one program
            does for all.
        end_ids: ids of the tokens that end a row, where it heeds them.
        config: static.
        n_top: how many of the most likely tokens to report for every row; static.
        bucket: of each record; static.

    Returns:
        What was chosen, and the new state.
    """
    rows = unpack_rows(packed, bucket)

    def choose(logits: Array, draws: SamplingRows) -> dict[str, Array]:
        return vars(sample(logits, draws, n_top=n_top, numerics=config.numerics))

    n_seqs = len(packed)
    is_real = rows.n_steps > 0
    cuts = jnp.minimum(jnp.arange(n_seqs + 1, dtype=jnp.int32), jnp.sum(is_real, dtype=jnp.int32))

    def goes_on(carry: tuple) -> Array:
        *_, goes, _ = carry
        return jnp.any(goes) & ~jnp.any(is_real & ~goes & rows.breaks_loop)

    def one_step(carry: tuple) -> tuple:
        i, state, tokens, draws, goes, steps = carry
        positions = draws.positions
        batch = Batch(
            tokens=tokens,
            positions=positions - 1,
            cu_q_lens=cuts,
            kv_lens=jnp.where(is_real, positions, 0),
            block_tables=rows.block_tables,
            read_slots=jnp.where(i == 0, rows.read_slots, rows.write_slots),
            write_slots=rows.write_slots,
            logits_rows=jnp.arange(n_seqs, dtype=jnp.int32),
        )
        logits, state = step(params, state, batch, config)
        chosen = _isolate(jnp.any(goes), lambda: choose(logits, draws))
        steps = jax.tree.map(lambda all_steps, new: all_steps.at[i].set(new), steps, chosen)
        ended = rows.stops_at_eos & jnp.any(chosen["tokens"][:, None] == end_ids, axis=-1)
        goes &= (chosen["faults"] == 0) & ~ended & (i + 1 < rows.n_steps)
        tokens = jnp.where(goes, chosen["tokens"], tokens)
        penalties = draws.penalties.followed_by(tokens)  # of rows that have ended, anything
        mus = jnp.where(goes, chosen["mus"], draws.mus)
        draws = draws.replace(positions=positions + goes.astype(jnp.int32), penalties=penalties, mus=mus)
        return i + 1, state, tokens, draws, goes, steps

    some_logits = jax.ShapeDtypeStruct((n_seqs, config.vocab_size), jnp.float32)
    steps = jax.tree.map(
        lambda a: jnp.zeros((MAX_STEPS, *a.shape), a.dtype), jax.eval_shape(choose, some_logits, rows.sampling)
    )
    start = jnp.int32(0), state, rows.tokens, rows.sampling, is_real, steps
    n_steps, state, *_, steps = lax.while_loop(goes_on, one_step, start)
    return Decoded(n_steps=n_steps, chosen=Sampled(**steps)), state
