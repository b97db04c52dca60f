"""The naive loop over `oxjax.step` that parity is measured with."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import oxjax


class Loop:
    """A loop over `oxjax.step` for one sequence, with pages handed out back to front."""

    def __init__(self, model: oxjax.Model):
        self.model = model
        self.step = jax.jit(partial(oxjax.step, config=model.config), donate_argnums=1)

    def logits(self, ids: np.ndarray, chunks: list[int]) -> np.ndarray:
        """Logits at every position."""
        n_pages = -(-len(ids) // 16)
        state = oxjax.init_state(self.model.config, n_pages=n_pages + 1, page_size=16, n_slots=3)
        table = jnp.arange(n_pages, 0, -1, dtype=jnp.int32)[None]
        logits, at = [], 0
        for i, n in enumerate(chunks):
            rows = np.arange(at, at + n, dtype=np.int32)
            batch = oxjax.Batch(
                tokens=jnp.asarray(ids[rows], jnp.int32),
                positions=jnp.asarray(rows),
                cu_q_lens=jnp.array([0, n], jnp.int32),
                kv_lens=jnp.array([at + n], jnp.int32),
                block_tables=table,
                read_slots=jnp.array([1 + i % 2], jnp.int32),
                write_slots=jnp.array([2 - i % 2], jnp.int32),
                logits_rows=jnp.arange(n, dtype=jnp.int32),
            )
            out, state = self.step(self.model.params, state, batch)
            logits.append(np.asarray(out))
            at += n
        return np.concatenate(logits)


def worst(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / expected.std())


def gelu_by_table(x):
    """GELU as ggml reads it: 16-bit in, 16-bit out."""
    half = jax.nn.gelu(x.astype(jnp.float16).astype(jnp.float32), approximate=True).astype(jnp.float16)
    return half.astype(jnp.float32)
