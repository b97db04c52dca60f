"""The recurrences of single layers against plain float64 loops, in both forms, over batches of several sequences."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oxjax
from oxjax.batch import row_layout
from oxjax.kernels import native
from oxjax.kernels.numerics import Numerics
from oxjax.models.layers.conv import Conv, causal_conv, previous_rows
from oxjax.models.layers.delta_net import delta_scan
from oxjax.models.layers.mamba import selective_scan
from oxjax.models.layers.mamba2 import decaying_scan
from oxjax.models.layers.recurrence import ACCELERATOR_CHUNK, CPU_CHUNK, MIN_CHUNK, NATIVE, ROWS, scan_method
from oxjax.models.layers.rwkv6 import wkv6
from oxjax.models.layers.rwkv7 import wkv7
from tests.helpers.cuts import same_bits_however_cut

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
    fading = 0  # which of the rows decays come from

    @staticmethod
    def rows(rng, n):
        dt, x = np.logaddexp(rng.normal(size=(n, VALUE)), 0), rng.normal(size=(n, VALUE))
        return dt, x, rng.normal(size=(n, KEY)), rng.normal(size=(n, KEY))

    @classmethod
    def step(cls, h, dt, x, b, c):
        h = h * np.exp(dt * cls.a) + np.outer(b, dt * x)
        return h, c @ h

    @classmethod
    def ours(cls, *args, method):
        return selective_scan(jnp.asarray(cls.a, jnp.float32), *args, method=method)


class Mamba2:
    a = -np.exp(np.random.default_rng(6).normal(size=HEADS))
    state = (HEADS, KEY, VALUE)
    fading = 0

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
    def ours(cls, *args, method):
        return decaying_scan(jnp.asarray(cls.a, jnp.float32), *args, method=method)


class DeltaNet:
    state = (HEADS, KEY, VALUE)
    fading, same, rate = 3, [1], 4

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
    def ours(cls, q, k, v, decay, *more, method):
        return delta_scan(q, k, v, decay.reshape(*q.shape[:2], -1), *more, method=method)


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
    fading = 1

    @staticmethod
    def rows(rng, n):
        receptance, key, decay = rng.normal(size=(3, n, HEADS, KEY))
        return receptance, -np.exp(decay), key, rng.normal(size=(n, HEADS, VALUE))

    @classmethod
    def step(cls, h, receptance, decay, key, value):
        new, y = np.empty(h.shape), np.empty((HEADS, VALUE))
        for i in range(HEADS):
            stored = np.outer(key[i], value[i])
            y[i] = receptance[i] @ (h[i] + np.diag(cls.bonus[i]) @ stored)
            new[i] = np.diag(np.exp(decay[i])) @ h[i] + stored
        return new, y

    @classmethod
    def ours(cls, *args, method):
        return wkv6(jnp.asarray(cls.bonus, jnp.float32), *args, method=method)


class GatedLinearAttention(Rwkv6):
    @classmethod
    def step(cls, h, receptance, decay, key, value):
        new = np.stack(
            [np.diag(np.exp(w)) @ s + np.outer(k, v) for w, s, k, v in zip(decay, h, key, value, strict=True)]
        )
        return new, np.einsum("hk,hkv->hv", receptance, new)

    @classmethod
    def ours(cls, *args, method):
        return wkv6(None, *args, method=method)


class Rwkv7:
    state = (HEADS, KEY, VALUE)
    fading, same, rate = 1, [4], 5

    @staticmethod
    def rows(rng, n):
        receptance, key, decay, replaced, rate = rng.normal(size=(5, n, HEADS, KEY))
        replaced = replaced / np.linalg.norm(replaced, axis=-1, keepdims=True)
        value = rng.normal(size=(n, HEADS, VALUE))
        return receptance, -0.6 * sigmoid(decay), key, value, replaced, sigmoid(rate)

    @classmethod
    def step(cls, h, receptance, decay, key, value, replaced, rate):
        new, y = np.empty(h.shape), np.empty((HEADS, VALUE))
        for i in range(HEADS):
            rewrite = np.diag(np.exp(decay[i])) - np.outer(rate[i] * replaced[i], replaced[i])
            new[i] = rewrite @ h[i] + np.outer(key[i], value[i])
            y[i] = receptance[i] @ new[i]
        return new, y

    ours = staticmethod(wkv7)


KINDS = [Mamba, Mamba2, DeltaNet, KimiDelta, Rwkv6, GatedLinearAttention, Rwkv7]
DECAYS = {"usual": 1.0, "weak": 1e-3, "strong": 1e3}
ROW_BY_ROW = [pytest.param(NATIVE, marks=pytest.mark.skipif(not native.kernels(), reason=native.describe())), ROWS]
CHUNKS = [CPU_CHUNK, ACCELERATOR_CHUNK]


@partial(jax.jit, static_argnames=("kind", "method"))
def scan(kind, method, rows, initial, layout):
    return kind.ours(*rows, initial, layout, method=method)


def run(kind, method, rows, initial, layout):
    rows = tuple(jnp.asarray(r, jnp.float32) for r in rows)
    return scan(kind, method, rows, jnp.asarray(initial, jnp.float32), layout)


def test_chunks_are_for_fast_mode_and_as_large_as_the_machine_likes(monkeypatch):
    def methods(backend):
        both = Numerics(exact=True, backend=backend), Numerics(exact=False, backend=backend)
        return [scan_method(numerics, has_kernel=kernel) for numerics in both for kernel in (True, False)]

    assert methods("native") == [NATIVE, ROWS, NATIVE, ROWS]
    assert methods("xla") == [ROWS, ROWS, CPU_CHUNK, ROWS]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert methods("xla") == [ROWS, ROWS, ACCELERATOR_CHUNK, ACCELERATOR_CHUNK]


@pytest.mark.parametrize("decays", ["mixed", *(pytest.param(d, marks=pytest.mark.slow) for d in DECAYS)])
@pytest.mark.parametrize("method", ROW_BY_ROW + CHUNKS)
@pytest.mark.parametrize("kind", KINDS)
def test_scan_is_the_recurrence(kind, method, decays):
    rng = np.random.default_rng(1)
    n = method if method in CHUNKS else CPU_CHUNK
    few = [MIN_CHUNK - 1, MIN_CHUNK, MIN_CHUNK + 9]
    lengths = [1, 2, 0, n - 1, n, n + 1, *few, 2 * n + 1, 3 * n, 9 * n + 3, 0]
    ends, n_rows = np.cumsum(lengths), sum(lengths) + 11
    rows, initial = kind.rows(rng, n_rows), rng.normal(size=(len(lengths), *kind.state))
    strength = DECAYS.get(decays, 10.0 ** rng.integers(-3, 4, n_rows))
    rows[kind.fading][:] *= np.reshape(strength, (-1, *(1,) * (rows[kind.fading].ndim - 1)))
    spoiled = [r.copy() for r in rows]
    for r in spoiled:
        r[ends[-1] :] = np.nan
    y, states = run(kind, method, spoiled, initial, layout_of(lengths, n_rows))
    assert np.isfinite(y).all()
    for s, (end, n) in enumerate(zip(ends, lengths, strict=True)):
        h, largest = initial[s], 1.0
        for t in range(end - n, end):
            h, expected = kind.step(h, *(r[t] for r in rows))
            largest = max(largest, np.abs(h).max())
            np.testing.assert_allclose(y[t], expected, rtol=0, atol=1e-5 * largest)
        np.testing.assert_allclose(states[s], h, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("method", CHUNKS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if hasattr(kind, "same")])
def test_the_same_key_again_and_again(kind, method):
    """Powers of the matrix that a chunk inverts would reach 1e18 here."""
    rng = np.random.default_rng(4)
    n = 2 * ACCELERATOR_CHUNK
    rows = list(kind.rows(rng, n))
    rows[kind.fading] *= 1e-4
    for i in kind.same:
        rows[i] = np.broadcast_to(rows[i][:1], rows[i].shape)
    rows[kind.rate] = 1 - rows[kind.rate] * 1e-3
    layout = layout_of([n], n)
    initial = np.zeros((1, *kind.state))
    for fast, exact in zip(*(run(kind, e, rows, initial, layout) for e in (method, ROWS)), strict=True):
        np.testing.assert_allclose(fast, exact, rtol=0, atol=5e-6 * max(1.0, np.abs(exact).max()))


def test_few_rows_go_one_by_one():
    rng = np.random.default_rng(5)
    n = MIN_CHUNK - 1
    rows, initial, layout = Mamba2.rows(rng, n), rng.normal(size=(2, *Mamba2.state)), layout_of([n - 1, 1], n)
    for fast, exact in zip(*(run(Mamba2, e, rows, initial, layout) for e in (CPU_CHUNK, ROWS)), strict=True):
        np.testing.assert_array_equal(fast, exact)


@pytest.mark.parametrize("method", ROW_BY_ROW)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_bits_do_not_depend_on_the_cut(kind, method):
    rng = np.random.default_rng(3)
    n = 75
    rows, initial = kind.rows(rng, n), rng.normal(size=(1, *kind.state)).astype(np.float32)
    whole, final = run(kind, method, rows, initial, layout_of([n], n))
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
            y, after = run(kind, method, parts, states, layout_of(lengths, sum(lengths) + padding))
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
