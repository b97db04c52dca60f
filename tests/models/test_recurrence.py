"""The recurrences of single layers against plain float64 loops, in both forms, over batches of several sequences."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuts import same_bits_however_cut

import oxjax
from oxjax.batch import row_layout
from oxjax.models.layers.conv import Conv, causal_conv, previous_rows
from oxjax.models.layers.delta_net import delta_scan
from oxjax.models.layers.mamba import selective_scan
from oxjax.models.layers.mamba2 import decaying_scan
from oxjax.models.layers.recurrence import CHUNK, MIN_CHUNK
from oxjax.models.layers.rwkv6 import wkv6
from oxjax.models.layers.rwkv7 import wkv7

LENGTHS = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3]
HEADS, GROUPS, KEY, VALUE = 4, 2, 6, 5


def layout_of(lengths, n_rows):
    """Sequences of these lengths, of which every other one goes on from 7 tokens, and padding up to n_rows."""
    ends = np.cumsum(lengths)
    earlier = np.where(np.arange(len(lengths)) % 2, 7, 0)
    positions = np.concatenate([e + np.arange(n) for e, n in zip(earlier, lengths, strict=True)])
    batch = oxjax.Batch(
        tokens=jnp.zeros(n_rows, jnp.int32),
        positions=jnp.asarray(np.pad(positions, (0, n_rows - ends[-1])), jnp.int32),
        cu_q_lens=jnp.asarray([0, *ends], jnp.int32),
        kv_lens=jnp.asarray(np.array(lengths) + earlier, jnp.int32),
        block_tables=jnp.zeros((len(lengths), 64), jnp.int32),
        read_slots=jnp.arange(1, 2 * len(lengths), 2, dtype=jnp.int32),
        write_slots=jnp.arange(2, 2 * len(lengths) + 1, 2, dtype=jnp.int32),
        logits_rows=jnp.zeros(1, jnp.int32),
    )
    return row_layout(batch, page_size=16, q_tile=8)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Mamba:
    a = -np.exp(np.random.default_rng(5).normal(size=(KEY, VALUE)))
    state = (KEY, VALUE)

    @staticmethod
    def rows(rng, n):
        dt, x = np.logaddexp(rng.normal(size=(n, VALUE)), 0), rng.normal(size=(n, VALUE))
        return dt, x, rng.normal(size=(n, KEY)), rng.normal(size=(n, KEY))

    @classmethod
    def step(cls, h, dt, x, b, c):
        h = h * np.exp(dt * cls.a) + np.outer(b, dt * x)
        return h, c @ h

    @classmethod
    def ours(cls, *args, exact):
        return selective_scan(jnp.asarray(cls.a, jnp.float32), *args)


class Mamba2:
    a = -np.exp(np.random.default_rng(6).normal(size=HEADS))
    state = (HEADS, KEY, VALUE)

    @staticmethod
    def rows(rng, n):
        b, c = rng.normal(size=(2, n, GROUPS, KEY))
        return np.logaddexp(rng.normal(size=(n, HEADS)), 0), rng.normal(size=(n, HEADS, VALUE)), b, c

    @classmethod
    def step(cls, h, dt, x, b, c):
        new, y = np.empty(h.shape), np.empty((HEADS, VALUE))
        for i in range(HEADS):
            group = i // (HEADS // GROUPS)
            new[i] = h[i] * np.exp(dt[i] * cls.a[i]) + np.outer(b[group], dt[i] * x[i])
            y[i] = c[group] @ new[i]
        return new, y

    @classmethod
    def ours(cls, *args, exact):
        return decaying_scan(jnp.asarray(cls.a, jnp.float32), *args, exact=exact)


class DeltaNet:
    state = (HEADS, KEY, VALUE)

    @staticmethod
    def rows(rng, n):
        q, k = rng.normal(size=(2, n, HEADS, KEY))
        q, k = (y / np.linalg.norm(y, axis=-1, keepdims=True) for y in (q, k))
        decay, beta = -np.logaddexp(rng.normal(size=(n, HEADS)), 0), sigmoid(rng.normal(size=(n, HEADS)))
        return q, k, rng.normal(size=(n, HEADS, VALUE)), decay, beta

    @classmethod
    def step(cls, h, q, k, v, decay, beta):
        new, y = np.empty(h.shape), np.empty((HEADS, VALUE))
        for i in range(HEADS):
            faded = h[i] * np.exp(decay[i])
            new[i] = faded + np.outer(k[i], beta[i] * (v[i] - k[i] @ faded))
            y[i] = q[i] @ new[i]
        return new, y

    @classmethod
    def ours(cls, q, k, v, decay, *more, exact):
        return delta_scan(q, k, v, decay.reshape(*q.shape[:2], -1), *more, exact=exact)


class KimiDelta(DeltaNet):
    """The same with a rate for every key channel."""

    @staticmethod
    def rows(rng, n):
        q, k, v, _, beta = DeltaNet.rows(rng, n)
        return q, k, v, -np.logaddexp(rng.normal(size=(n, HEADS, KEY)), 0), beta

    @classmethod
    def step(cls, h, q, k, v, decay, beta):
        new, y = np.empty(h.shape), np.empty((HEADS, VALUE))
        for i in range(HEADS):
            rewrite = np.eye(KEY) - beta[i] * np.outer(k[i], k[i])  # equation 1 of the paper
            new[i] = rewrite @ np.diag(np.exp(decay[i])) @ h[i] + beta[i] * np.outer(k[i], v[i])
            y[i] = q[i] @ new[i]
        return new, y


class Rwkv6:
    bonus = np.random.default_rng(7).normal(size=(HEADS, KEY))
    state = (HEADS, KEY, VALUE)

    @staticmethod
    def rows(rng, n):
        receptance, key, decay = rng.normal(size=(3, n, HEADS, KEY))
        return receptance, np.exp(-np.exp(decay)), key, rng.normal(size=(n, HEADS, VALUE))

    @classmethod
    def step(cls, h, receptance, decay, key, value):
        new, y = np.empty(h.shape), np.empty((HEADS, VALUE))
        for i in range(HEADS):
            stored = np.outer(key[i], value[i])
            y[i] = receptance[i] @ (h[i] + np.diag(cls.bonus[i]) @ stored)
            new[i] = np.diag(decay[i]) @ h[i] + stored
        return new, y

    @classmethod
    def ours(cls, *args, exact):
        return wkv6(jnp.asarray(cls.bonus, jnp.float32), *args)


class GatedLinearAttention(Rwkv6):
    @classmethod
    def step(cls, h, receptance, decay, key, value):
        new = np.stack([np.diag(w) @ s + np.outer(k, v) for w, s, k, v in zip(decay, h, key, value, strict=True)])
        return new, np.einsum("hk,hkv->hv", receptance, new)

    @classmethod
    def ours(cls, *args, exact):
        return wkv6(None, *args)


class Rwkv7:
    state = (HEADS, KEY, VALUE)

    @staticmethod
    def rows(rng, n):
        receptance, key, decay, replaced, rate = rng.normal(size=(5, n, HEADS, KEY))
        replaced = replaced / np.linalg.norm(replaced, axis=-1, keepdims=True)
        value = rng.normal(size=(n, HEADS, VALUE))
        return receptance, np.exp(-0.6 * sigmoid(decay)), key, value, replaced, sigmoid(rate)

    @classmethod
    def step(cls, h, receptance, decay, key, value, replaced, rate):
        new, y = np.empty(h.shape), np.empty((HEADS, VALUE))
        for i in range(HEADS):
            rewrite = np.diag(decay[i]) - np.outer(rate[i] * replaced[i], replaced[i])
            new[i] = rewrite @ h[i] + np.outer(key[i], value[i])
            y[i] = receptance[i] @ new[i]
        return new, y

    @classmethod
    def ours(cls, *args, exact):
        return wkv7(*args)


CHUNKED = [Mamba, Mamba2, DeltaNet, KimiDelta]
KINDS = [*CHUNKED, Rwkv6, GatedLinearAttention, Rwkv7]


@partial(jax.jit, static_argnames=("kind", "exact"))
def scan(kind, exact, rows, initial, layout):
    return kind.ours(*rows, initial, layout, exact=exact)


def run(kind, exact, rows, initial, layout):
    rows = tuple(jnp.asarray(r, jnp.float32) for r in rows)
    return scan(kind, exact, rows, jnp.asarray(initial, jnp.float32), layout)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_scan_is_the_recurrence(kind, length, exact):
    # Others take whole chunks and a rest beside it; the last sequence has no rows.
    rng = np.random.default_rng(length)
    lengths, n_rows = [length, 3 * CHUNK + 5, 1, 0], 6 * CHUNK
    rows, initial = kind.rows(rng, n_rows), rng.normal(size=(len(lengths), *kind.state))
    ends = np.cumsum(lengths)
    spoiled = [r.copy() for r in rows]
    for r in spoiled:
        r[ends[-1] :] = np.nan
    y, states = run(kind, exact, spoiled, initial, layout_of(lengths, n_rows))
    for s, (end, n) in enumerate(zip(ends, lengths, strict=True)):
        h = initial[s]
        for t in range(end - n, end):
            h, expected = kind.step(h, *(r[t] for r in rows))
            # Outputs of up to 20. In chunks a decay is the difference of running sums of up to a few hundred,
            # which float32 rounds by some 1e-5; row by row the errors are ten times smaller.
            np.testing.assert_allclose(y[t], expected, rtol=0, atol=3e-5 if exact else 1e-4)
        np.testing.assert_allclose(states[s], h, rtol=0, atol=3e-5 if exact else 1e-4)


@pytest.mark.parametrize("kind", CHUNKED)
@pytest.mark.parametrize("rows_per_sequence", [1, MIN_CHUNK - 1, MIN_CHUNK, MIN_CHUNK + 9])
def test_small_chunks(kind, rows_per_sequence):
    rng = np.random.default_rng(1)
    lengths = [rows_per_sequence + d for d in (0, 2, -1, -1)]
    rows, initial = kind.rows(rng, sum(lengths)), rng.normal(size=(4, *kind.state))
    layout = layout_of(lengths, sum(lengths))
    for fast, exact in zip(*(run(kind, e, rows, initial, layout) for e in (False, True)), strict=True):
        np.testing.assert_allclose(fast, exact, rtol=0, atol=3e-5)


@pytest.mark.parametrize("kind", CHUNKED)
def test_decay_to_nothing_stays_finite(kind):
    """Chunks divide no decay by another: what has faded below float32 is zero, not NaN."""
    rng = np.random.default_rng(2)
    rows = list(kind.rows(rng, 2 * CHUNK))
    faded = 3 if issubclass(kind, DeltaNet) else 0
    rows[faded] = rows[faded] * 1e4
    y, states = run(kind, False, rows, rng.normal(size=(1, *kind.state)), layout_of([2 * CHUNK], 2 * CHUNK))
    assert np.isfinite(y).all()
    assert np.isfinite(states).all()


@pytest.mark.parametrize("kind", [DeltaNet, KimiDelta])
def test_the_same_key_again_and_again(kind):
    """Powers of the matrix that a chunk inverts would reach 1e18 here."""
    rng = np.random.default_rng(4)
    n = 2 * CHUNK
    q, k, v, decay, beta = kind.rows(rng, n)
    rows, initial = (
        (q, np.broadcast_to(k[:1], k.shape), v, decay * 1e-4, 1 - beta * 1e-3),
        np.zeros((1, *DeltaNet.state)),
    )
    layout = layout_of([n], n)
    for fast, exact in zip(*(run(kind, e, rows, initial, layout) for e in (False, True)), strict=True):
        np.testing.assert_allclose(fast, exact, rtol=0, atol=3e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_exact_bits_do_not_depend_on_the_cut(kind):
    rng = np.random.default_rng(3)
    n = 75
    rows, initial = kind.rows(rng, n), rng.normal(size=(1, *kind.state)).astype(np.float32)
    whole, final = run(kind, True, rows, initial, layout_of([n], n))
    others = kind.rows(rng, 40)
    for cut in ([1] * n, [13, 62], [64, 11], [5, 60, 10]):
        at, state = 0, initial
        for i, length in enumerate(cut):
            # Neighbours before and after, and padding, differ from chunk to chunk.
            before, padding = (i % 2) * 4, (i % 2) * 3
            lengths = [before, length, 2]
            parts = [np.concatenate([o[:before], r[at : at + length], o[: 2 + padding]]) for r, o in
                     zip(rows, others, strict=True)]  # fmt: skip
            states = np.concatenate([initial + 1, state, initial - 1])
            y, after = run(kind, True, parts, states, layout_of(lengths, sum(lengths) + padding))
            np.testing.assert_array_equal(y[before : before + length], whole[at : at + length])
            at, state = at + length, np.asarray(after[1:2])
        np.testing.assert_array_equal(state, final)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_causal_conv(kernel, bias):
    rng = np.random.default_rng(kernel)
    lengths, channels = [1, 2, 0, 3, 9], 7
    x, weight = rng.normal(size=(20, channels)), rng.normal(size=(kernel, channels))
    shift = rng.normal(size=channels) if bias else np.zeros(channels)
    window = rng.normal(size=(len(lengths), kernel - 1, channels))
    spoiled = x.copy()
    spoiled[sum(lengths) :] = np.nan
    f32 = lambda y: jnp.asarray(y, jnp.float32)  # noqa: E731
    p = Conv(weight=f32(weight), bias=f32(shift) if bias else None)
    layout = layout_of(lengths, 20)
    y, after = jax.jit(lambda x, w: causal_conv(p, x, w, layout))(f32(spoiled), f32(window))
    for s, (end, n) in enumerate(zip(np.cumsum(lengths), lengths, strict=True)):
        seen = np.concatenate([window[s], x[end - n : end]])
        for t in range(n):
            expected = (seen[t : t + kernel] * weight).sum(0) + shift
            np.testing.assert_allclose(y[end - n + t], expected, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(after[s], f32(seen[n:]))


def test_previous_rows():
    rng = np.random.default_rng(8)
    lengths, channels = [1, 2, 0, 3, 9], 7
    x, window = rng.normal(size=(20, channels)), rng.normal(size=(len(lengths), 1, channels))
    x[sum(lengths) :] = np.nan
    f32 = lambda y: jnp.asarray(y, jnp.float32)  # noqa: E731
    before, after = jax.jit(previous_rows)(f32(x), f32(window), layout_of(lengths, 20))
    for s, (end, n) in enumerate(zip(np.cumsum(lengths), lengths, strict=True)):
        seen = np.concatenate([window[s], x[end - n : end]])
        np.testing.assert_array_equal(before[end - n : end], f32(seen[:n]))
        np.testing.assert_array_equal(after[s], f32(seen[n:]))


# One file of each kind of state: convolution and scan, both beside pages, and a block with two of them.
BITS = ["mamba", "mamba2", "jamba", "falconh1", "qwen35", "qwen3next"]


@pytest.mark.parametrize("name", ["mamba", *(pytest.param(n, marks=pytest.mark.slow) for n in BITS[1:])])
def test_exact_logits_do_not_depend_on_the_cut(data, name):
    same_bits_however_cut(oxjax.load(data / "archs" / f"{name}.gguf"))


def test_state_takes_the_bytes_it_says(data):
    config = oxjax.load(data / "archs" / "falconh1.gguf").config
    state = oxjax.init_state(config, n_pages=1, page_size=16, n_slots=3)
    recurrent = [s for layer in state for s in layer if hasattr(s, "ssm")]
    assert len(recurrent) == len(config.layers)
    assert sum(a.nbytes for a in jax.tree.leaves(recurrent)) == 3 * config.slot_bytes
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(recurrent))
    assert dataclasses.replace(config, dtype="bfloat16").slot_bytes == config.slot_bytes
