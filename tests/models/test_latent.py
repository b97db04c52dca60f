"""Latent attention: what it keeps, and that the absorbed form is the published one."""

import jax.numpy as jnp
import numpy as np
import pytest

import oxjax
from oxjax.batch import Batch, row_layout
from oxjax.cache.pages import LatentPages
from oxjax.cache.transfer import export_state, import_state
from oxjax.config import LatentSpec, LayerSpec, ModelConfig
from oxjax.kernels.dot import ROW_TILE, dot_heads
from oxjax.kernels.paged_attention import EXACT_Q_TILE
from oxjax.models.layers.context import Context
from oxjax.models.layers.latent import LatentAttention, latent_attention
from oxjax.models.layers.linear import Linear
from oxjax.models.layers.norms import Norm
from oxjax.models.layers.rope import RopeSpec, rope_angles

D, ROWS = 48, 21
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
    saved = export_state(((pages,),), [5, 2, 7], None, 10)
    empty = oxjax.init_state(config(SPEC), n_pages=9, page_size=4)
    again = export_state(import_state(empty, [1, 2, 3], None, saved, 0), [1, 2, 3], None, 10)
    for got, kept, array in zip(again.rows, saved.rows, (pages.latent, pages.rope_k), strict=True):
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


def expanded(p, x, cos, sin):
    """Keys and values of every head written out, in float64 (DeepSeek-V2, equations 37 to 47)."""
    s = SPEC

    def normed(weight, y):
        return y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-5) * np.asarray(weight, np.float64)

    def rotated(y):
        a, b = y[..., 0::2], y[..., 1::2]
        c, d = (t.reshape(len(y), *(1,) * (y.ndim - 2), -1) for t in (cos, sin))
        return np.stack([a * c - b * d, a * d + b * c], axis=-1).reshape(y.shape)

    x = np.asarray(x, np.float64)
    q = normed(p.q_norm.weight, x @ p.q_low.weight) @ np.asarray(p.q.weight, np.float64)
    q = q.reshape(len(x), s.n_heads, -1)
    low = x @ np.asarray(p.kv_low.weight, np.float64)
    latent, k_rope = normed(p.kv_norm.weight, low[:, : s.kv_rank]), rotated(low[:, s.kv_rank :])
    k = np.einsum("tc,hnc->thn", latent, p.k_up)
    v = np.einsum("tc,hcv->thv", latent, p.v_up)
    scores = np.einsum("qhn,khn->hqk", q[..., : s.nope_dim], k)
    scores = (scores + np.einsum("qhr,kr->hqk", rotated(q[..., s.nope_dim :]), k_rope)) * s.scale
    scores = np.where(np.tril(np.ones((len(x), len(x)), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("hqk,khv->qhv", weights / weights.sum(-1, keepdims=True), v)
    return mixed.reshape(len(x), -1) @ np.asarray(p.out.weight, np.float64)


@pytest.mark.parametrize("exact", [True, False])
def test_the_absorbed_form_is_the_expanded_one(exact):
    x = jnp.asarray(np.random.default_rng(2).standard_normal((ROWS, D), np.float32))
    positions = jnp.arange(ROWS, dtype=jnp.int32)
    batch = Batch(
        tokens=jnp.zeros(ROWS, jnp.int32),
        positions=positions,
        cu_q_lens=jnp.array([0, ROWS], jnp.int32),
        kv_lens=jnp.array([ROWS], jnp.int32),
        block_tables=jnp.array([[3, 1]], jnp.int32),
        read_slots=jnp.zeros(1, jnp.int32),
        write_slots=jnp.zeros(1, jnp.int32),
        logits_rows=jnp.zeros(1, jnp.int32),
    )
    p, angles = params(), rope_angles(positions, jnp.array([1.0, 0.3, 0.1]), 1.0)
    ctx = Context(row_layout(batch, page_size=16, q_tile=EXACT_Q_TILE), (angles,), config(SPEC, exact=exact))
    pages = LatentPages(jnp.full((4, 16, SPEC.kv_rank), jnp.nan), jnp.full((4, 16, SPEC.rope_dim), jnp.nan))
    y, _ = latent_attention(p, x, pages, SPEC, ctx)
    # Float32 products of width up to 48 against float64, values of size about one.
    np.testing.assert_allclose(y, expanded(p, x, *(np.asarray(a, np.float64) for a in angles)), rtol=0, atol=1e-5)


def test_products_by_head_keep_the_bits_of_a_row():
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((3 * ROW_TILE + 5, 4, 40), np.float32))
    w = jnp.asarray(rng.standard_normal((4, 40, 24), np.float32))
    whole = np.asarray(dot_heads(x, w, exact=True))
    np.testing.assert_allclose(whole, np.einsum("thi,hio->tho", x, w), rtol=0, atol=1e-4)
    for start, rows in ((0, 1), (9, 1), (3, 15), (1, 16), (8, 17)):
        np.testing.assert_array_equal(dot_heads(x[start : start + rows], w, exact=True), whole[start : start + rows])
