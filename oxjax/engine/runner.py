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
from oxjax.engine.choice import Choice, Moment, room_for
from oxjax.engine.packed import (
    Room,
    decoding_record,
    n_words,
    sampling_record,
    sizes,
)
from oxjax.engine.scheduler import Work
from oxjax.models.decoder import Params, init_state
from oxjax.sampling.edits import LEAST_EDITS
from oxjax.sampling.penalties import LEAST_RECENT

log = logging.getLogger("oxjax")
LEAST_TOP = 8  # most likely tokens to report, where any are wanted


class Ran(NamedTuple):
    """What a batch gave, on the device; None where nobody wants it.

    Attributes:
        last: logits of the last row of each piece of work, and of padding.
        logits: of all rows of the batch, those beyond the work padding.
        hidden: their hidden states.
    """

    last: Float[Array, "N vocab"] | None
    logits: Float[Array, "R vocab"] | None
    hidden: Float[Array, "R d_model"] | None


class Wanted(NamedTuple):
    """A token to be chosen.

    Attributes:
        row: of the logits.
        choice: how.
        moment: what it depends on.
    """

    row: int
    choice: Choice
    moment: Moment


class Decoding(NamedTuple):
    """A sequence that decodes, for some steps.

    Attributes:
        work: its next row.
        choice: how its next token is chosen, and those after it.
        moment: what the next one depends on.
        n_steps: most steps.
        ends_call: whether nobody goes on without it.
    """

    work: Work
    choice: Choice
    moment: Moment
    n_steps: int
    ends_call: bool


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
        n_slots: slots of the pool, the null slot included.
        end_ids: tokens that end a text.
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
        n_slots: int = 1,
        end_ids: Iterable[int] = (),
    ):
        self.config, self.params, self.max_batch = config, params, max_batch
        self.state = init_state(config, n_pages=n_pages, page_size=page_size, n_slots=n_slots)
        self.buckets = programs.row_buckets(max_rows, exact=config.exact)
        # Rows whose scores are found together: few, or blocks of as many as there are logits at once.
        small = [size for size in self.buckets if size <= programs.SCORED_ROWS]
        self.score_sizes = sorted({*small, programs.whole_blocks(self.buckets[-1] + 1)})
        self.table_width = -(-max_context // page_size)
        self._mask_words = -(-config.vocab_size // 32)
        counts = {self._shape(bucket, False).n_seqs for bucket in self.buckets}
        self._no_masks = {n: jax.device_put(np.zeros((n, self._mask_words), np.uint32)) for n in counts}
        self._end_ids = jax.device_put(np.array(sorted(end_ids), np.int32))
        self.compilations: Counter[str] = Counter()

    def run(self, work: Seq[Work]) -> Ran:
        """Run the rows of `work`; what comes back is on the device."""
        n_rows = sum(w.n_rows for w in work)
        bucket = next(b for b in self.buckets if b >= n_rows)
        wants = {w.sequence.wants for w in work} - {None}
        chooses = any(w.sequence.wants is None for w in work)
        shape = self._shape(bucket, bool(wants))
        packed = programs.build_batch(work, shape, all_logits=bool(wants))
        if not wants:
            return Ran(self._run_batch(packed, shape), None, None)
        last = np.zeros(shape.n_seqs, np.int32)
        last[: len(work)] = np.cumsum([w.n_rows for w in work]) - 1
        if wants == {"logits"}:
            logits = self._run_batch(packed, shape)
            return Ran(self._rows_of(logits, last) if chooses else None, logits, None)
        hidden = self._run_hidden(packed, shape)
        logits = self._logits_of(hidden) if "logits" in wants else None
        return Ran(self._logits_of(self._rows_of(hidden, last)) if chooses else None, logits, hidden)

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
        """How likely tokens are after rows; logits are there for a block of rows at a time.

        Args:
            hidden: from `run`.
            rows: of it; they may come more than once.
            targets: a token for each of them.
            n_top: the most likely tokens to report, at least.

        Returns:
            logprobs, ranks, top_tokens, top_logprobs as in `Sampled`, and whether the logits were finite, a line for
            each target.
        """
        n_top = self._top_sizes(n_top)[-1]
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
        self, logits: Float[Array, "N vocab"], wanted: Seq[Wanted], n_top: int, room: Room | None = None
    ) -> dict[str, np.ndarray]:
        """Choose tokens from rows of logits.

        Args:
            logits: from `run`.
            wanted: a token each. Rows may come more than once.
            n_top: the most likely tokens to report, at least.
            room: that the program has; None is enough for what is wanted.

        Returns:
            The columns of `Sampled`, on the host, an entry for each token wanted.
        """
        n_top = self._top_sizes(n_top)[-1]
        room = room_for((choice, moment) for _, choice, moment in wanted) if room is None else room
        record = sampling_record(room)
        waves: list[dict[int, int]] = [{}]  # a call takes one token per row: row to place in `wanted`
        for place, (row, *_) in enumerate(wanted):
            wave = next((w for w in waves if row not in w), None)
            if wave is None:
                waves.append(wave := {})
            wave[row] = place
        columns: dict[str, np.ndarray] = {}
        for wave in waves:
            packed = np.zeros((logits.shape[0], n_words(record)), np.int32)  # rows that nobody wants are greedy
            records = packed.view(record)[:, 0]
            for row, place in wave.items():
                _, choice, moment = wanted[place]
                records[row] = choice.packed(room)
                choice.place(records, row, moment, room)
            masks = self._masks(len(packed), {row: wanted[place].moment.mask for row, place in wave.items()})
            with self._counted(programs.choose, f"sampling of {len(packed)} rows, {n_top} most likely, {room}"):
                sampled = programs.choose(logits, packed, masks, n_top=n_top, room=room, exact=self.config.exact)
            for name in sampled.__dataclass_fields__:
                part = np.asarray(getattr(sampled, name))
                column = columns.setdefault(name, np.empty((len(wanted), *part.shape[1:]), part.dtype))
                column[list(wave.values())] = part[list(wave)]
        return columns

    def _masks(self, n_rows: int, masks: Mapping[int, np.ndarray | None]) -> Array:
        """An array of these masks of rows, on the device: jax would take NumPy's for another signature."""
        if all(mask is None for mask in masks.values()):
            return self._no_masks[n_rows]
        packed = np.zeros((n_rows, self._mask_words), np.uint32)
        for row, mask in masks.items():
            if mask is not None:
                packed[row] = mask
        return jax.device_put(packed)

    def decode(self, sequences: Seq[Decoding], n_top: int) -> dict[str, np.ndarray]:
        """Run steps of sequences that decode, in one call; see `decode_steps`.

        Args:
            sequences: with room for all their steps.
            n_top: as for `sample`.

        Returns:
            The fields of `Decoded`, on the host: a column for each sequence, and more of padding.
        """
        room = room_for((s.choice, s.moment) for s in sequences)
        record = decoding_record(room)
        packed = self._undecoded(len(sequences), room)
        records, tables = packed[:, : n_words(record)].view(record)[:, 0], packed[:, n_words(record) :]
        for i, (work, choice, moment, n_steps, ends_call) in enumerate(sequences):
            state = work.sequence.state
            records[i] = (
                choice.packed(room),
                moment.tokens[-1],
                n_steps,
                not choice.params.ignore_eos,
                ends_call,
                state.slot or NULL_PAGE,
                state.next_slot or NULL_PAGE,
            )
            choice.place(records["sampling"], i, moment, room)
            tables[i, : len(state.pages)] = state.pages
        return self._decode(packed, self._top_sizes(n_top)[-1], room)

    def _undecoded(self, n_seqs: int, room: Room) -> Int[np.ndarray, "S words"]:
        """Padding for so many sequences at least."""
        bucket = next(b for b in self.buckets if b >= n_seqs)
        n = n_words(decoding_record(room)) + self.table_width
        return np.zeros((min(bucket, self.max_batch), n), np.int32)

    def _decode(self, packed: Int[np.ndarray, "S words"], n_top: int, room: Room) -> dict[str, np.ndarray]:
        with self._counted(programs.decode, f"decoding of {len(packed)} rows, {n_top} most likely, {room}"):
            decoded, self.state = programs.decode(
                self.params, self.state, packed, self._end_ids, config=self.config, n_top=n_top, room=room
            )
        return jax.device_get(vars(decoded))

    def _top_sizes(self, most: int) -> list[int]:
        """All numbers of reported tokens that programs are compiled for, where up to so many are wanted."""
        vocab = self.config.vocab_size
        return [0, *(min(n, vocab) for n in sizes(LEAST_TOP, min(most, vocab)))] if most else [0]

    def export(self, pages: Seq[int], slot: int | None, n_tokens: int) -> SwappedState:
        """A sequence's state on the host; see `export_state`."""
        with self._counted(gather, f"export of {page_bucket(len(pages))} pages"):
            return export_state(self.state, pages, slot, n_tokens)

    def restore(self, pages: Seq[int], slot: int | None, saved: SwappedState, first: int) -> None:
        """Write what `export` gave to pages and a slot; see `import_state`."""
        with self._counted(scatter, f"import of {page_bucket(len(pages))} pages"):
            self.state = import_state(self.state, pages, slot, saved, first)

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
        rooms = starmap(Room, product(sizes(LEAST_EDITS, n_edits), sizes(LEAST_RECENT, n_recent)))
        kinds = list(product(self._top_sizes(n_top), rooms))
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
                for n, size in product([] if n_scored is None else self._top_sizes(n_scored), self.score_sizes):
                    self._score(states, [0] * size, [0] * size, n)
        for n_seqs in {min(bucket, self.max_batch) for bucket in self.buckets}:
            for n, here in kinds:
                self._decode(self._undecoded(n_seqs, here), n, here)
        self.copy_page(NULL_PAGE, NULL_PAGE)
        for n_pages in (1 << i for i in range(page_bucket(self.table_width).bit_length())):
            self.restore([NULL_PAGE] * n_pages, NULL_PAGE, self.export([NULL_PAGE] * n_pages, NULL_PAGE, 1), 0)

    def _counted(self, function: jax.stages.Wrapped, cause: str) -> programs.CountCompilations:
        return programs.CountCompilations(function, cause, self.compilations)
