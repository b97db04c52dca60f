"""The device side of the engine: builds batches in a few fixed shapes, runs programs, owns the state."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from itertools import product, starmap
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from oxjax.cache.allocator import NULL_PAGE
from oxjax.cache.states import SwappedState
from oxjax.cache.transfer import copy_page, export_state, gather, import_state, page_bucket, scatter
from oxjax.config import ModelConfig
from oxjax.engine import programs
from oxjax.engine.config import MAX_STEPS, EngineConfig
from oxjax.engine.decode import decoding_record
from oxjax.engine.scheduler import ScheduledChunk
from oxjax.models.decoder import Params, init_state
from oxjax.sampling.edits import LEAST_EDITS
from oxjax.sampling.packing import (
    SamplingBucket,
    SamplingInputs,
    SamplingMetadata,
    bucket_for,
    bucket_sizes,
    n_words,
    pack_rows,
    sample_packed,
    top_buckets,
)
from oxjax.sampling.penalties import LEAST_RECENT
from oxjax.sampling.sampled import Columns, to_host

log = logging.getLogger("oxjax")


class ModelOutput(NamedTuple):
    """Outputs of the model for a batch, on the device; None where nobody asked for them.

    Attributes:
        last: logits of the last row of each piece of work, and of padding.
        logits: logits of all rows of the batch; those beyond the work are padding.
        hidden: hidden states of all rows.
    """

    last: Float[Array, "N vocab"] | None
    logits: Float[Array, "R vocab"] | None
    hidden: Float[Array, "R d_model"] | None


class SampleRow(NamedTuple):
    """A row of logits to sample a token from.

    Attributes:
        row: its index.
        metadata: sampling parameters of the request.
        inputs: those of its next token.
    """

    row: int
    metadata: SamplingMetadata
    inputs: SamplingInputs


class DecodeRow(NamedTuple):
    """A sequence to decode for some steps.

    Attributes:
        work: its next row.
        metadata: sampling parameters of the request.
        inputs: those of its next token.
        n_steps: maximum number of steps.
        breaks_loop: the call ends when it ends.
    """

    work: ScheduledChunk
    metadata: SamplingMetadata
    inputs: SamplingInputs
    n_steps: int
    breaks_loop: bool


class Runner:
    """Runs scheduled work. Every shape it uses follows from a row bucket, so shapes are few and known.

    Args:
        config: static.
        params: on the device.
        sizes: of the engine.
        n_slots: slots of the pool, the null slot included.
        end_ids: tokens that end a text.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        sizes: EngineConfig,
        *,
        n_slots: int = 1,
        end_ids: Iterable[int] = (),
    ):
        self.config, self.params, self.max_batch = config, params, sizes.max_batch
        self.state = init_state(config, n_pages=sizes.n_pages, page_size=sizes.page_size, n_slots=n_slots)
        self.buckets = programs.row_buckets(sizes.max_rows, config.numerics)
        # Rows whose scores are found together: few, or blocks of as many as there are logits at once.
        small = [size for size in self.buckets if size <= programs.SCORED_ROWS]
        self.score_sizes = sorted({*small, programs.whole_blocks(self.buckets[-1] + 1)})
        self.table_width = -(-sizes.max_context // sizes.page_size)
        self._mask_words = -(-config.vocab_size // 32)
        counts = {self._shape(bucket, False).n_seqs for bucket in self.buckets}
        self._no_masks = {n: jax.device_put(np.zeros((n, self._mask_words), np.uint32)) for n in counts}
        self._end_ids = jax.device_put(np.array(sorted(end_ids), np.int32))
        self.compilations: Counter[str] = Counter()

    def run(self, work: Seq[ScheduledChunk]) -> ModelOutput:
        """Run the rows of `work`; what comes back is on the device."""
        n_rows = sum(w.n_rows for w in work)
        bucket = next(b for b in self.buckets if b >= n_rows)
        kinds = {w.sequence.output_kind for w in work} - {None}
        chooses = any(w.sequence.output_kind is None for w in work)
        shape = self._shape(bucket, bool(kinds))
        packed = programs.build_batch(work, shape, all_logits=bool(kinds))
        if not kinds:
            return ModelOutput(self._run_batch(packed, shape), None, None)
        last = np.zeros(shape.n_seqs, np.int32)
        last[: len(work)] = np.cumsum([w.n_rows for w in work]) - 1
        if kinds == {"logits"}:
            logits = self._run_batch(packed, shape)
            return ModelOutput(self._rows_of(logits, last) if chooses else None, logits, None)
        hidden = self._run_hidden(packed, shape)
        logits = self._logits_of(hidden) if "logits" in kinds else None
        return ModelOutput(self._logits_of(self._rows_of(hidden, last)) if chooses else None, logits, hidden)

    def _rows_of(self, array: Array, rows: Int[np.ndarray, " n"]) -> Array:
        with self._counted(programs.take_rows, f"choice of {len(rows)} of {len(array)} rows"):
            return programs.take_rows(array, rows)

    def _shape(self, bucket: int, all_logits: bool) -> programs.BatchShape:
        n_seqs = min(bucket, self.max_batch)
        return programs.BatchShape(bucket, n_seqs, self.table_width, bucket if all_logits else n_seqs)

    def _run_batch(self, packed: Int[np.ndarray, " n"], shape: programs.BatchShape) -> Array:
        with self._counted(programs.batch_logits, f"step of {shape.n_rows} rows, {shape.n_logits} logits"):
            logits, self.state = programs.batch_logits(self.params, self.state, packed, shape=shape, config=self.config)
        return logits

    def _run_hidden(self, packed: Int[np.ndarray, " n"], shape: programs.BatchShape) -> Array:
        with self._counted(programs.batch_hidden, f"hidden states of {shape.n_rows} rows"):
            hidden, self.state = programs.batch_hidden(self.params, self.state, packed, shape=shape, config=self.config)
        return hidden

    def _logits_of(self, hidden: Array) -> Array:
        with self._counted(programs.logits_of_hidden, f"logits of {len(hidden)} hidden states"):
            return programs.logits_of_hidden(self.params, hidden, config=self.config)

    def score(
        self, hidden: Float[Array, "N d_model"], rows: Seq[int], targets: Seq[int], n_top: int
    ) -> dict[str, np.ndarray]:
        """Log-probabilities of tokens after rows; logits exist for one block of rows at a time.

        Args:
            hidden: from `run`.
            rows: of it; they may come more than once.
            targets: a token for each of them.
            n_top: the most likely tokens to report, at least.

        Returns:
            logprobs, ranks, top_tokens, top_logprobs as in `Sampled`, and whether the logits were finite, a line for
            each target.
        """
        n_top = top_buckets(n_top, self.config.vocab_size)[-1]
        most = self.score_sizes[-1]
        parts = [
            self._score(hidden, rows[start : start + most], targets[start : start + most], n_top)
            for start in range(0, len(rows), most)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _score(
        self, hidden: Float[Array, "N d_model"], rows: Seq[int], targets: Seq[int], n_top: int
    ) -> dict[str, np.ndarray]:
        n = len(rows)
        size = next(s for s in self.score_sizes if s >= n)
        wanted = np.zeros((2, size), np.int32)
        wanted[:, :n] = rows, targets
        states = self._rows_of(hidden, wanted[0])
        with self._counted(programs.scores, f"scores of {size} rows, {n_top} most likely"):
            found = programs.scores(self.params, states, wanted[1], np.int32(n), config=self.config, n_top=n_top)
        return {name: column[:n] for name, column in jax.device_get(found).items()}

    def sample(
        self, logits: Float[Array, "N vocab"], rows: Seq[SampleRow], n_top: int, bucket: SamplingBucket | None = None
    ) -> Columns:
        """Sample tokens from rows of logits.

        Args:
            logits: from `run`.
            rows: a token each, from different rows of the logits.
            n_top: minimum number of most likely tokens to report.
            bucket: of the program; None is the smallest that holds the rows.

        Returns:
            Columns with an entry for each of `rows`.
        """
        n_top = top_buckets(n_top, self.config.vocab_size)[-1]
        bucket = bucket_for(((r.metadata, r.inputs) for r in rows), MAX_STEPS) if bucket is None else bucket
        packed = pack_rows(logits.shape[0], rows, bucket)
        masks = self._masks(len(packed), {row: inputs.mask for row, _, inputs in rows})
        with self._counted(sample_packed, f"sampling of {len(packed)} rows, {n_top} most likely, {bucket}"):
            sampled = sample_packed(logits, packed, masks, n_top=n_top, bucket=bucket, numerics=self.config.numerics)
        taken = [row for row, *_ in rows]
        return [column[taken] for column in to_host(sampled)]

    def _masks(self, n_rows: int, masks: Mapping[int, np.ndarray | None]) -> Array:
        """An array of these masks of rows, on the device: jax would take NumPy's for another signature."""
        if all(mask is None for mask in masks.values()):
            return self._no_masks[n_rows]
        packed = np.zeros((n_rows, self._mask_words), np.uint32)
        for row, mask in masks.items():
            if mask is not None:
                packed[row] = mask
        return jax.device_put(packed)

    def decode(self, rows: Seq[DecodeRow], n_top: int) -> tuple[int, Columns]:
        """Run steps of sequences that decode, in one call; see `decode_steps`.

        Args:
            rows: sequences with pages for all their steps.
            n_top: as for `sample`.

        Returns:
            Number of steps that ran, and columns `[step, sequence]`, with more steps and sequences as padding.
        """
        bucket = bucket_for(((r.metadata, r.inputs) for r in rows), MAX_STEPS)
        record = decoding_record(bucket)
        packed = self._padding(len(rows), bucket)
        records, tables = packed[:, : n_words(record)].view(record)[:, 0], packed[:, n_words(record) :]
        for i, (work, metadata, inputs, n_steps, breaks_loop) in enumerate(rows):
            state = work.sequence.state
            records["tokens"][i] = inputs.tokens[-1]
            records["n_steps"][i] = n_steps
            records["stops_at_eos"][i] = not metadata.params.ignore_eos
            records["breaks_loop"][i] = breaks_loop
            records["read_slots"][i] = state.slot or NULL_PAGE
            records["write_slots"][i] = state.next_slot or NULL_PAGE
            metadata.write(records["sampling"], i, inputs, bucket)
            tables[i, : len(state.pages)] = state.pages
        return self._decode(packed, top_buckets(n_top, self.config.vocab_size)[-1], bucket)

    def _padding(self, n_seqs: int, bucket: SamplingBucket) -> Int[np.ndarray, "S words"]:
        """Empty decoding rows, for at least this many sequences."""
        n_rows = next(b for b in self.buckets if b >= n_seqs)
        n = n_words(decoding_record(bucket)) + self.table_width
        return np.zeros((min(n_rows, self.max_batch), n), np.int32)

    def _decode(self, packed: Int[np.ndarray, "S words"], n_top: int, bucket: SamplingBucket) -> tuple[int, Columns]:
        with self._counted(programs.decode, f"decoding of {len(packed)} rows, {n_top} most likely, {bucket}"):
            decoded, self.state = programs.decode(
                self.params, self.state, packed, self._end_ids, config=self.config, n_top=n_top, bucket=bucket
            )
        n_steps, *columns = jax.device_get(jax.tree.leaves(decoded))
        return int(n_steps), columns

    def export(self, pages: Seq[int], slot: int | None, n_tokens: int) -> SwappedState:
        """A sequence's state on the host; see `export_state`."""
        with self._counted(gather, f"export of {page_bucket(len(pages))} pages"):
            return export_state(self.state, pages, slot, n_tokens)

    def restore(self, pages: Seq[int], slot: int | None, swapped: SwappedState, first: int) -> None:
        """Write what `export` gave to pages and a slot; see `import_state`."""
        with self._counted(scatter, f"import of {page_bucket(len(pages))} pages"):
            self.state = import_state(self.state, pages, slot, swapped, first)

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page on every layer."""
        with self._counted(copy_page, "copy of a page"):
            self.state = copy_page(self.state, *jax.device_put((np.int32(source), np.int32(target))))

    def warm_up(
        self,
        *,
        n_top: int = 0,
        n_edits: int = 0,
        n_recent: int = 0,
        all_logits: bool = False,
        hidden: bool = False,
        n_scored: int | None = None,
    ) -> None:
        """Compile every shape that `run`, `sample` and preemption can meet, on batches of padding.

        Args:
            n_top: also for up to this many reported tokens.
            n_edits: also for rows that change up to this many single logits.
            n_recent: also for rows whose penalties look at up to this many tokens.
            all_logits: also for requests that want the logits of every row.
            hidden: also for requests that want hidden states.
            n_scored: also for requests that want scores, with up to this many reported tokens; None is for none.
        """
        buckets = starmap(
            SamplingBucket, product(bucket_sizes(LEAST_EDITS, n_edits), bucket_sizes(LEAST_RECENT, n_recent))
        )
        kinds = list(product(top_buckets(n_top, self.config.vocab_size), buckets))
        for bucket in self.buckets:
            shape, whole = self._shape(bucket, False), self._shape(bucket, True)
            last = np.zeros(shape.n_seqs, np.int32)
            logits = self._run_batch(programs.build_batch([], shape, all_logits=False), shape)
            for n, here in kinds:
                self.sample(logits, [], n, here)
            if all_logits:
                self._rows_of(self._run_batch(programs.build_batch([], whole, all_logits=True), whole), last)
            if hidden or n_scored is not None:
                states = self._run_hidden(programs.build_batch([], whole, all_logits=True), whole)
                self._logits_of(self._rows_of(states, last))
                if all_logits:
                    self._logits_of(states)
                scored = [] if n_scored is None else top_buckets(n_scored, self.config.vocab_size)
                for n, size in product(scored, self.score_sizes):
                    self._score(states, [0] * size, [0] * size, n)
        for n_seqs in {min(bucket, self.max_batch) for bucket in self.buckets}:
            for n, here in kinds:
                self._decode(self._padding(n_seqs, here), n, here)
        self.copy_page(NULL_PAGE, NULL_PAGE)
        for n_pages in (1 << i for i in range(page_bucket(self.table_width).bit_length())):
            self.restore([NULL_PAGE] * n_pages, NULL_PAGE, self.export([NULL_PAGE] * n_pages, NULL_PAGE, 1), 0)

    def _counted(self, function: jax.stages.Wrapped, cause: str) -> programs.CountCompilations:
        return programs.CountCompilations(function, cause, self.compilations)
