"""The naive loop over `oxjax.step` that parity is measured with."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import oxjax

PAGE, ROWS, SEQUENCES = 16, 128, 3  # every batch but single rows is padded to these, so that it compiles once


def load(path, **options) -> oxjax.Model:
    """A model with dequantised math, which is what references are computed with."""
    return oxjax.load(path, weights="float32", **options)


class Loop:
    """A loop over `oxjax.step` for a few sequences side by side, with pages handed out back to front."""

    def __init__(self, model: oxjax.Model):
        self.model = model
        self.step = jax.jit(partial(oxjax.step, config=model.config), donate_argnums=1)

    def logits(self, ids: np.ndarray, chunks: list[int]) -> np.ndarray:
        """Logits at every position of one sequence."""
        return self.together([(ids, chunks)])[0]

    def together(self, sequences: list[tuple[np.ndarray, list[int]]]) -> list[np.ndarray]:
        """Logits of several sequences; each step takes the next chunk of every one that has any left."""
        width = max(-(-len(ids) // PAGE) for ids, _ in sequences)
        # As large for one sequence as for all, so that programs are the same.
        state = oxjax.init_state(
            self.model.config, n_pages=1 + SEQUENCES * width, page_size=PAGE, n_slots=1 + 2 * SEQUENCES
        )
        logits, at = [[] for _ in sequences], [0] * len(sequences)
        for i in range(max(len(chunks) for _, chunks in sequences)):
            taken = [chunks[i] if i < len(chunks) else 0 for _, chunks in sequences]
            batch = self.batch(sequences, at, taken, i, width, small=taken == [1])
            out, state = self.step(self.model.params, state, batch)
            for s, (stop, n) in enumerate(zip(np.cumsum(taken), taken, strict=True)):
                logits[s].append(np.asarray(out[stop - n : stop]))
                at[s] += n
        return [np.concatenate(rows) for rows in logits]

    @staticmethod
    def batch(sequences, at, taken, i, width, *, small=False, n_rows=ROWS):
        """Step `i`: from position `at[s]` on, the next `taken[s]` rows of each sequence, `width` pages wide."""
        n_rows, n_seqs = (1, 1) if small else (n_rows, SEQUENCES)
        arrays = {name: np.zeros(n_rows, np.int32) for name in ("tokens", "positions")}
        arrays |= {name: np.zeros(n_seqs, np.int32) for name in ("kv_lens", "read_slots", "write_slots")}
        tables, ends = np.zeros((n_seqs, width), np.int32), np.zeros(n_seqs + 1, np.int32)
        row = 0
        for s, ((ids, _), start, n) in enumerate(zip(sequences, at, taken, strict=True)):
            arrays["tokens"][row : row + n] = ids[start : start + n]
            arrays["positions"][row : row + n] = np.arange(start, start + n)
            arrays["kv_lens"][s] = start + n
            tables[s] = np.arange((s + 1) * width, s * width, -1)
            if n:
                arrays["read_slots"][s], arrays["write_slots"][s] = 2 * s + 1 + i % 2, 2 * s + 2 - i % 2
            row += n
            ends[s + 1 :] = row
        return oxjax.Batch(
            **{name: jnp.asarray(array) for name, array in arrays.items()},
            cu_q_lens=jnp.asarray(ends),
            block_tables=jnp.asarray(tables),
            logits_rows=jnp.arange(n_rows, dtype=jnp.int32),
        )


def worst(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / expected.std())


def gelu_by_table(x):
    """GELU as ggml reads it: 16-bit in, 16-bit out."""
    half = jax.nn.gelu(x.astype(jnp.float16).astype(jnp.float32), approximate=True).astype(jnp.float16)
    return half.astype(jnp.float32)
