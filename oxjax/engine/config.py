"""`EngineConfig`: the sizes of an engine, none of which changes a result in exact mode."""

from __future__ import annotations

from dataclasses import dataclass

from oxjax.errors import InvalidRequestError
from oxjax.kernels.numerics import KV_BLOCK

MAX_STEPS = 64  # decode steps of one call of the device


@dataclass(frozen=True)
class EngineConfig:
    """The sizes of an engine. In exact mode no bit of a result depends on any of them.

    Attributes:
        n_pages: pages of the pool, the null page included.
        page_size: tokens of a page; a divisor of the attention block of 128.
        max_batch: sequences that run at once (vLLM's `max_num_seqs`).
        max_rows: rows of a step, at least `max_batch` (vLLM's `max_num_batched_tokens`).
        max_context: tokens that a sequence may reach.
        reuse_prefixes: find the state of prompts that begin as others did instead of computing it.
        swap: keep the state of a preempted request on the host instead of computing it again.
        n_checkpoints: recurrent states that are kept for reuse and rewinding, for models with recurrent layers.
        checkpoint_every: tokens between them; a multiple of `page_size`.
        steps_per_call: maximum number of decode steps that the device takes without the host, up to 64. Fewer are
            taken where that takes long.

    Raises:
        InvalidRequestError: a size is out of its range.
    """

    n_pages: int
    page_size: int = 16
    max_batch: int = 8
    max_rows: int = 256
    max_context: int = 4096
    reuse_prefixes: bool = True
    swap: bool = True
    n_checkpoints: int = 16
    checkpoint_every: int = 256
    steps_per_call: int = MAX_STEPS

    def __post_init__(self) -> None:
        if self.page_size < 1 or KV_BLOCK % self.page_size:
            raise InvalidRequestError(f"page_size {self.page_size}: expected a divisor of {KV_BLOCK}")
        if not 1 <= self.steps_per_call <= MAX_STEPS:
            raise InvalidRequestError(f"steps_per_call {self.steps_per_call}: expected 1 to {MAX_STEPS}")
        if self.max_rows < self.max_batch:
            raise InvalidRequestError(
                f"max_rows {self.max_rows}: expected at least max_batch, {self.max_batch}, a row for each sequence"
            )
