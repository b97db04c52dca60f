"""The kernel against textbook attention in float64, over every tile, block and page boundary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oxjax.batch import Batch, row_layout
from oxjax.kernels.numerics import KV_BLOCK, Numerics
from oxjax.kernels.paged_attention import EXACT_Q_TILE, FAST_Q_TILE, paged_attention, q_tile_rows
from oxjax.models.layers.attention import alibi_slopes


def textbook(q, k, v, positions, *, scale, window=None, chunk=None, softcap=None, slopes=None, sinks=None):
    """softmax(scale q kᵀ) v for one sequence; q `[n, H, D]`, k and v `[len, Hkv, D]`."""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(a.astype(np.float64), group, axis=1) for a in (k, v))
    scores = np.einsum("qhd,khd->hqk", q.astype(np.float64), k) * scale
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    distance = positions[:, None] - np.arange(len(k))
    if slopes is not None:
        scores = scores - slopes[:, None, None] * distance
    hidden = (distance < 0) | (distance >= (window or np.inf))
    if chunk is not None:
        hidden |= (positions // chunk)[:, None] != np.arange(len(k)) // chunk
    scores = np.where(hidden, -np.inf, scores)
    sink = np.full(q.shape[1], -np.inf) if sinks is None else np.asarray(sinks, np.float64)
    best = np.maximum(scores.max(-1, keepdims=True), sink[:, None, None])
    weights = np.exp(scores - best)
    return np.einsum("hqk,khd->qhd", weights / (weights.sum(-1, keepdims=True) + np.exp(sink[:, None, None] - best)), v)


class Case:
    """Sequences of the given (length, query rows) in shuffled pages, poisoned with NaN wherever nobody wrote."""

    def __init__(self, sequences, *, page_size=16, heads=4, kv_heads=2, key_dim=8, value_dim=6, seed=0, pad=3):
        rng = np.random.default_rng(seed)
        per_seq = -(-max(n for n, _ in sequences) // page_size) + 1
        tables = rng.permutation(np.arange(1, 1 + per_seq * len(sequences))).reshape(len(sequences), per_seq)
        self.k = np.full((tables.size + 1, page_size, kv_heads, key_dim), np.nan, np.float32)
        self.v = np.full((tables.size + 1, page_size, kv_heads, value_dim), np.nan, np.float32)
        self.sequences, rows = [], [np.zeros((pad, heads, key_dim), np.float32)]
        for (length, n), table in zip(sequences, tables, strict=True):
            k, v = (rng.standard_normal((length, *a.shape[2:]), np.float32) for a in (self.k, self.v))
            at = np.arange(length)
            self.k[table[at // page_size], at % page_size] = k
            self.v[table[at // page_size], at % page_size] = v
            q = rng.standard_normal((n, heads, key_dim), np.float32)
            rows.insert(-1, q)
            self.sequences.append((q, k, v, np.arange(length - n, length)))
        self.q = np.concatenate(rows)
        positions = np.concatenate([p for *_, p in self.sequences] + [np.zeros(pad, int)])
        counts = np.cumsum([0] + [n for _, n in sequences])
        self.batch = Batch(
            tokens=jnp.zeros(len(self.q), jnp.int32),
            positions=jnp.asarray(positions, jnp.int32),
            cu_q_lens=jnp.asarray(counts, jnp.int32),
            kv_lens=jnp.asarray([n for n, _ in sequences], jnp.int32),
            block_tables=jnp.asarray(tables, jnp.int32),
            read_slots=jnp.zeros(len(sequences), jnp.int32),
            write_slots=jnp.zeros(len(sequences), jnp.int32),
            logits_rows=jnp.zeros(1, jnp.int32),
        )
        self.page_size = page_size

    def run(self, numerics, *, q_tile=EXACT_Q_TILE, **options):
        def attend(q, k, v, batch):
            layout = row_layout(batch, page_size=self.page_size, q_tile=q_tile)
            return paged_attention(q, k, v, layout, numerics=numerics, **options)

        return np.asarray(jax.jit(attend)(self.q, self.k, self.v, self.batch))[: int(self.batch.cu_q_lens[-1])]

    def expected(self, **options):
        return np.concatenate([textbook(*s, **options) for s in self.sequences])


LENGTHS = [1, 2, 15, 16, 17, KV_BLOCK - 1, KV_BLOCK, KV_BLOCK + 1, 2 * KV_BLOCK + 5]
# Float32 softmax and sums over at most 261 terms of size about 1 against float64.
TOLERANCE = {"rtol": 0, "atol": 5e-6}


@pytest.mark.parametrize("length", LENGTHS)
def test_decode_row(numerics, length):
    case = Case([(length, 1)])
    np.testing.assert_allclose(case.run(numerics, scale=0.3), case.expected(scale=0.3), **TOLERANCE)


@pytest.mark.parametrize("n", [1, 2, EXACT_Q_TILE - 1, EXACT_Q_TILE, EXACT_Q_TILE + 1, FAST_Q_TILE + 1, 100])
@pytest.mark.parametrize("q_tile", [1, EXACT_Q_TILE, FAST_Q_TILE])
def test_prefill_after_a_past(numerics, n, q_tile):
    case = Case([(n + 40, n)])
    np.testing.assert_allclose(case.run(numerics, q_tile=q_tile, scale=0.3), case.expected(scale=0.3), **TOLERANCE)


@pytest.mark.parametrize("window", [1, 5, 16, KV_BLOCK, KV_BLOCK + 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_ragged_batch_with_window_and_cap(numerics, window, softcap):
    case = Case([(300, 1), (9, 9), (1, 1), (140, 30), (KV_BLOCK, 2)])
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    np.testing.assert_allclose(case.run(numerics, **options), case.expected(**options), **TOLERANCE)


@pytest.mark.parametrize("heads,kv_heads", [(1, 1), (4, 4), (8, 1), (6, 2)])
@pytest.mark.parametrize("page_size", [1, 8, 64, 128])
def test_head_groups_and_page_sizes(numerics, heads, kv_heads, page_size):
    case = Case([(70, 5), (33, 33)], heads=heads, kv_heads=kv_heads, page_size=page_size)
    np.testing.assert_allclose(case.run(numerics, scale=1.0), case.expected(scale=1.0), **TOLERANCE)


@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (6, 2)])
def test_scores_lose_with_distance(numerics, heads, kv_heads):
    case = Case([(300, 1), (9, 9), (140, 30)], heads=heads, kv_heads=kv_heads)
    options = {"scale": 0.3, "slopes": alibi_slopes(heads, 8.0)}
    np.testing.assert_allclose(case.run(numerics, **options), case.expected(**options), **TOLERANCE)


@pytest.mark.parametrize("chunk", [5, KV_BLOCK, 200])
def test_queries_see_their_own_chunk(numerics, chunk):
    case = Case([(300, 1), (201, 90), (9, 9), (200, 1)])
    options = {"scale": 0.3, "chunk": chunk}
    np.testing.assert_allclose(case.run(numerics, **options), case.expected(**options), **TOLERANCE)


@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (6, 2)])
def test_sinks_take_their_share(numerics, heads, kv_heads):
    """Sinks far below, among and far above the scores."""
    case = Case([(300, 1), (9, 9), (140, 30)], heads=heads, kv_heads=kv_heads)
    sinks = jnp.linspace(-20.0, 20.0, heads)
    options = {"scale": 0.3, "sinks": sinks, "window": 100}
    np.testing.assert_allclose(case.run(numerics, **options), case.expected(**options), **TOLERANCE)


@pytest.mark.parametrize("at", [1, 5])
def test_keys_may_lie_in_two_arrays(numerics, at):
    case = Case([(300, 1), (140, 30)], kv_heads=1)
    whole = case.run(numerics, scale=0.3)
    case.k, more = case.k[..., :at], case.k[..., at:]
    np.testing.assert_array_equal(case.run(numerics, scale=0.3, more_k_pages=jnp.asarray(more)), whole)


@pytest.mark.parametrize("dims", [(1, 1), (15, 17), (64, 64), (65, 63), (128, 130)])
def test_head_dimensions(numerics, dims):
    case = Case([(150, 1), (140, 30)], key_dim=dims[0], value_dim=dims[1])
    np.testing.assert_allclose(case.run(numerics, scale=0.1), case.expected(scale=0.1), **TOLERANCE)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
def test_pages_of_sixteen_bits(numerics, dtype):
    case = Case([(150, 1), (140, 30)], key_dim=20, value_dim=33)
    case.sequences = [
        (q, *(np.asarray(a, dtype).astype(np.float32) for a in (k, v)), p) for q, k, v, p in case.sequences
    ]
    case.k, case.v = jnp.asarray(case.k, dtype), jnp.asarray(case.v, dtype)
    # XLA rounds queries and weights to the pages' type too: 2^-9 of sums of values of about 1.
    np.testing.assert_allclose(case.run(numerics, scale=0.2), case.expected(scale=0.2), rtol=0, atol=2e-2)


@pytest.mark.parametrize("heads,kv_heads", [(4, 2), (40, 1), (3, 3)])
def test_bits_of_a_row_do_not_depend_on_company(numerics, backend, heads, kv_heads):
    """A prompt's rows in one batch, in pieces, and one at a time, beside others."""
    whole = Case([(300, 300)], heads=heads, kv_heads=kv_heads, page_size=8)
    options = {"q_tile": EXACT_Q_TILE, "scale": 0.3, "window": 150}
    expected = whole.run(numerics, **options)
    q, k, v, _ = whole.sequences[0]
    for cut, n in ((1, 1), (131, 3), (129, 70), (300, 77), (2, 2))[: None if backend == "native" else 3]:
        part = Case([(9, 9), (cut, n), (20, 1)], heads=heads, kv_heads=kv_heads, page_size=8)
        table, at = np.asarray(part.batch.block_tables[1]), np.arange(cut)
        part.k[table[at // 8], at % 8], part.v[table[at // 8], at % 8] = k[:cut], v[:cut]
        part.q[9 : 9 + n] = q[cut - n : cut]
        np.testing.assert_array_equal(part.run(numerics, **options)[9 : 9 + n], expected[cut - n : cut])


def test_slopes_are_the_published_ones():
    """Press et al. 2022, section 3: 1/2 to 1/256 for 8 heads; 12 heads take every other one of 16 heads' besides."""
    np.testing.assert_allclose(alibi_slopes(8, 8.0), 0.5 ** np.arange(1, 9))
    np.testing.assert_allclose(alibi_slopes(12, 8.0)[8:], 0.5 ** (np.array([1, 3, 5, 7]) / 2))


def test_large_scores_stay_finite(numerics):
    case = Case([(200, 20)])
    np.testing.assert_allclose(
        case.run(numerics, scale=1e3), case.expected(scale=1e3), rtol=0, atol=1e-3
    )  # scores of thousands leave float32 softmax three digits less


def test_page_size_must_divide_the_block(numerics):
    with pytest.raises(ValueError, match="48 does not divide"):
        Case([(10, 1)], page_size=48).run(numerics, q_tile=1, scale=1.0)


def test_fast_mode_gives_decode_rows_tiles_of_one():
    assert q_tile_rows(8, 8, Numerics(exact=False)) == 1
    assert q_tile_rows(64, 8, Numerics(exact=False)) == FAST_Q_TILE
    assert q_tile_rows(1, 1, Numerics()) == q_tile_rows(512, 8, Numerics()) == EXACT_Q_TILE
