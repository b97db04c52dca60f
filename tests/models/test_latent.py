"""Latent attention: what it keeps, and that both of its forms are the published one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oxjax
from oxjax.batch import Batch, row_layout
from oxjax.cache.pages import LatentPages
from oxjax.cache.transfer import export_state, import_state
from oxjax.config import LatentSpec, LayerSpec, ModelConfig, TemperatureSpec
from oxjax.kernels.expanded_attention import expanding_pays
from oxjax.kernels.native import resolve_backend
from oxjax.kernels.numerics import Numerics
from oxjax.kernels.paged_attention import q_tile_rows
from oxjax.models.layers.context import Context
from oxjax.models.layers.latent import LatentAttention, latent_attention
from oxjax.models.layers.linear import Linear
from oxjax.models.layers.norms import Norm
from oxjax.models.layers.rope import RopeSpec, rope_angles

D = 48
SPEC = LatentSpec(n_heads=3, q_rank=20, kv_rank=24, nope_dim=10, rope_dim=6, value_dim=7, scale=0.3)


def config(spec, **more):
    return ModelConfig(
        architecture="deepseek2",
        vocab_size=10,
        d_model=D,
        context_length=64,
        norm_eps=1e-5,
        layers=(LayerSpec((spec,)),),
        ropes=(RopeSpec(dim=spec.rope_dim, pairing="norm"),),
        **more,
    )


def test_deepseek_v3_keeps_576_numbers_a_token():
    v3 = LatentSpec(128, 1536, 512, 128, 64, 128, scale=0.1)
    assert config(v3).page_bytes(16) == 16 * 576 * 4
    assert config(v3, dtype="bfloat16").page_bytes(1) == 576 * 2
    state = oxjax.init_state(config(v3), n_pages=3, page_size=16)
    assert sum(a.nbytes for a in (state[0][0].latent, state[0][0].rope_k)) == 3 * config(v3).page_bytes(16)


def test_pages_of_latents_leave_the_device_and_come_back():
    rng = np.random.default_rng(0)
    pages = LatentPages(*(jnp.asarray(rng.standard_normal((9, 4, n), np.float32)) for n in (24, 6)))
    swapped = export_state(((pages,),), [5, 2, 7], None, 10)
    empty = oxjax.init_state(config(SPEC), n_pages=9, page_size=4)
    again = export_state(import_state(empty, [1, 2, 3], None, swapped, 0), [1, 2, 3], None, 10)
    for got, kept, array in zip(again.rows, swapped.rows, (pages.latent, pages.rope_k), strict=True):
        np.testing.assert_array_equal(got, kept)
        np.testing.assert_array_equal(kept[:4], array[5])


def params():
    rng = np.random.default_rng(1)

    def numbers(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32) / np.sqrt(shape[-2]))

    s = SPEC
    return LatentAttention(
        q=Linear(numbers(s.q_rank, s.n_heads * (s.nope_dim + s.rope_dim))),
        q_low=Linear(numbers(D, s.q_rank)),
        q_norm=Norm(1.0 + 0.2 * numbers(1, s.q_rank)[0]),
        kv_low=Linear(numbers(D, s.kv_rank + s.rope_dim)),
        kv_norm=Norm(1.0 + 0.2 * numbers(1, s.kv_rank)[0]),
        k_up=numbers(s.n_heads, s.nope_dim, s.kv_rank),
        v_up=numbers(s.n_heads, s.kv_rank, s.value_dim),
        out=Linear(numbers(s.n_heads * s.value_dim, D)),
    )


def published(p, x, cos, sin, spec, first=0):
    """Keys and values of every head written out, in float64 (DeepSeek-V2, equations 37 to 47), from row `first` on."""

    def normed(weight, y):
        return y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-5) * np.asarray(weight, np.float64)

    def rotated(y):
        a, b = y[..., 0::2], y[..., 1::2]
        c, d = (t.reshape(len(y), *(1,) * (y.ndim - 2), -1) for t in (cos, sin))
        return np.stack([a * c - b * d, a * d + b * c], axis=-1).reshape(y.shape)

    x = np.asarray(x, np.float64)
    q = normed(p.q_norm.weight, x @ p.q_low.weight) @ np.asarray(p.q.weight, np.float64)
    q = q.reshape(len(x), spec.n_heads, -1)
    if spec.temperature is not None:
        t = spec.temperature
        q = q * (1 + t.scale * np.log1p((np.arange(len(x)) + t.offset) // t.length))[:, None, None]
    low = x @ np.asarray(p.kv_low.weight, np.float64)
    latent, k_rope = normed(p.kv_norm.weight, low[:, : spec.kv_rank]), rotated(low[:, spec.kv_rank :])
    k = np.einsum("tc,hnc->thn", latent, p.k_up)
    v = np.einsum("tc,hcv->thv", latent, p.v_up)
    scores = np.einsum("qhn,khn->hqk", q[..., : spec.nope_dim], k)
    scores = (scores + np.einsum("qhr,kr->hqk", rotated(q[..., spec.nope_dim :]), k_rope)) * spec.scale
    scores = np.where(np.tril(np.ones((len(x), len(x)), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("hqk,khv->qhv", weights / weights.sum(-1, keepdims=True), v)
    return (mixed.reshape(len(x), -1) @ np.asarray(p.out.weight, np.float64))[first:]


# Rows and context of each sequence: around the tiles of rows and the blocks of keys, and none at all.
MANY = [(130, 130), (1, 1), (0, 0), (127, 300), (128, 128), (257, 400), (3, 3)]
FEW = [(5, 400), (1, 129), (0, 0), (7, 257)] * 10


@pytest.mark.parametrize("temperature", [None, TemperatureSpec(scale=0.3, length=50)])
@pytest.mark.parametrize("cut", [MANY, FEW, [(21, 21)]])
@pytest.mark.parametrize("exact", [True, False])
def test_both_forms_are_the_published_one(exact, cut, temperature):
    """Ragged batches whose sequences have a past; pages and rows that nobody owns hold NaN."""
    numerics = Numerics(exact=exact, backend=resolve_backend("auto"))
    spec, p, rng = dataclasses.replace(SPEC, temperature=temperature), params(), np.random.default_rng(2)
    texts = [rng.standard_normal((context, D), np.float32) for _, context in cut]
    inv_freq = jnp.array([1.0, 0.3, 0.1])
    tables = 1 + rng.permutation(26 * len(cut)).reshape(len(cut), 26)
    pages = LatentPages(*(jnp.full((1 + tables.size, 16, n), jnp.nan) for n in (spec.kv_rank, spec.rope_dim)))

    @jax.jit
    def step(x, pages, batch):
        layout = row_layout(batch, page_size=16, q_tile=q_tile_rows(x.shape[0], len(cut), numerics))
        angles = rope_angles(batch.positions, inv_freq, 1.0)
        dims = {"nope_dim": spec.nope_dim, "rope_dim": spec.rope_dim, "value_dim": spec.value_dim}
        pays = expanding_pays(layout, rank=spec.kv_rank, **dims)
        return *latent_attention(p, x, pages, spec, Context(layout, (angles,), config(spec, numerics=numerics))), pays

    def run(pages, chunks):
        """Rows `start` to `stop` of each sequence, and seven of padding."""
        positions = np.concatenate([np.arange(*chunk) for chunk in chunks])
        batch = Batch(
            tokens=jnp.zeros(len(positions) + 7, jnp.int32),
            positions=jnp.asarray(np.pad(positions, (0, 7)), jnp.int32),
            cu_q_lens=jnp.asarray(np.cumsum([0, *(stop - start for start, stop in chunks)]), jnp.int32),
            kv_lens=jnp.asarray([stop for _, stop in chunks], jnp.int32),
            block_tables=jnp.asarray(tables, jnp.int32),
            read_slots=jnp.zeros(len(cut), jnp.int32),
            write_slots=jnp.zeros(len(cut), jnp.int32),
            logits_rows=jnp.zeros(1, jnp.int32),
        )
        x = np.concatenate([text[start:stop] for text, (start, stop) in zip(texts, chunks, strict=True)])
        return step(jnp.asarray(np.pad(x, ((0, 7), (0, 0)), constant_values=np.nan)), pages, batch)

    _, pages, _ = run(pages, [(0, context - rows) for rows, context in cut])
    y, _, pays = run(pages, [(context - rows, context) for rows, context in cut])
    assert bool(pays) == (cut is MANY)
    at = 0
    for text, (rows, context) in zip(texts, cut, strict=True):
        if not rows:
            continue
        angles = rope_angles(jnp.arange(context), inv_freq, 1.0)
        expected = published(p, text, *(np.asarray(a, np.float64) for a in angles), spec, context - rows)
        # Float32 products of width up to 48 against float64, values of size about one.
        np.testing.assert_allclose(y[at : at + rows], expected, rtol=0, atol=1e-5)
        at += rows
