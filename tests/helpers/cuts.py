"""One check over whole models: logits of exact mode do not depend on how tokens are cut into steps."""

import jax
import jax.numpy as jnp
import numpy as np

import oxjax


def same_bits_however_cut(model):
    """Whole, one by one, and in chunks with neighbours and padding; freed slots and pages hold NaN at first."""
    step = jax.jit(oxjax.step, static_argnames="config")
    ids = np.random.default_rng(0).integers(3, 500, (3, 40))

    def logits(cuts, n_rows, n_seqs):
        """Of sequence 0; `cuts` has one chunk length per sequence for every step."""
        state = oxjax.init_state(model.config, n_pages=16, page_size=16, n_slots=9)
        state = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), state)
        at, out = np.zeros(n_seqs, int), []
        for turn, lengths in enumerate(cuts):
            cut = np.pad(lengths, (0, n_seqs - len(lengths)))
            rows = [np.arange(a, a + n) for a, n in zip(at, cut, strict=True)]
            pad = (0, n_rows - sum(cut))
            batch = oxjax.Batch(
                tokens=jnp.asarray(
                    np.pad(np.concatenate([ids[min(s, 2)][r] for s, r in enumerate(rows)]), pad), jnp.int32
                ),
                positions=jnp.asarray(np.pad(np.concatenate(rows), pad), jnp.int32),
                cu_q_lens=jnp.asarray([0, *np.cumsum(cut)], jnp.int32),
                kv_lens=jnp.asarray(at + cut, jnp.int32),
                block_tables=jnp.asarray(1 + np.arange(3 * n_seqs).reshape(n_seqs, 3) % 15, jnp.int32),
                read_slots=jnp.asarray([1 + 2 * min(s, 3) + turn % 2 for s in range(n_seqs)], jnp.int32),
                write_slots=jnp.asarray(
                    [2 + 2 * min(s, 3) - turn % 2 if cut[s] else 0 for s in range(n_seqs)], jnp.int32
                ),
                logits_rows=jnp.arange(n_rows, dtype=jnp.int32),
            )
            got, state = step(model.params, state, batch, config=model.config)
            out.append(np.asarray(got)[: cut[0]])
            at += cut
        return np.concatenate(out)

    whole = logits([[40]], 40, 1)
    assert np.isfinite(whole).all()
    np.testing.assert_array_equal(logits([[1]] * 40, 1, 1), whole)
    np.testing.assert_array_equal(logits([[7, 20, 3], [20, 5, 1], [13, 15, 36]], 64, 4), whole)
