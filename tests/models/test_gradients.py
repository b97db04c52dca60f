"""Gradients through whole models on the XLA backend, against finite differences and forward mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oxjax
from oxjax.models.encoder import Texts, encode
from tests.helpers.parity_loop import Loop
from tests.helpers.recurrent_synth import CASES as RECURRENT
from tests.helpers.recurrent_synth import write

FILES = {
    "dense": "qwen3",
    "MLA with experts": "deepseek2_mla",
    "experts": "mixtral",
    "mamba": "mamba",
    "mamba2": "mamba2",
    "delta net": "qwen35",
    "encoder": "bert",
}
SYNTHETIC = {"rwkv6": "rwkv6", "rwkv7": "rwkv7", "kimi delta": "kimi-linear"}
LENGTHS = (40, 150)  # of two sequences: around a chunk of a recurrence, and over a block of keys
STEP = 2e-3  # of the finite difference, relative to the parameters' size


@pytest.fixture
def model(request, data, tmp_path):
    name, exact = request.param
    if name in SYNTHETIC:
        path = tmp_path / "model.gguf"
        case = SYNTHETIC[name]
        write(path, case, *RECURRENT[case], data / "archs" / "llama.gguf")
    else:
        path = data / "archs" / f"{FILES[name]}.gguf"
    return oxjax.load(path, exact=exact, weights="float32", backend="xla")


def ids(vocab, n):
    return np.random.default_rng(n).integers(3, vocab, n)


def loss_of(model):
    """A function of the parameters: a fixed combination of what the model gives for every row of a ragged batch."""
    config, rng = model.config, np.random.default_rng(0)
    if not config.causal:
        tokens = np.concatenate([ids(config.vocab_size, n) for n in (*LENGTHS, 7)])
        texts = Texts(jnp.asarray(tokens, jnp.int32), jnp.asarray(np.cumsum([0, *LENGTHS]), jnp.int32))
        weights = jnp.asarray(rng.standard_normal((sum(LENGTHS), config.d_model), np.float32))
        return lambda params: jnp.mean(encode(params, texts, config)[: sum(LENGTHS)] * weights)

    sequences = [(ids(config.vocab_size, n), [n]) for n in LENGTHS]
    width = -(-max(LENGTHS) // 16)
    batch = Loop.batch(sequences, [0, 0], LENGTHS, 0, width, n_rows=sum(LENGTHS) + 5)
    state = oxjax.init_state(config, n_pages=1 + 2 * width, page_size=16, n_slots=5)
    weights = jnp.asarray(rng.standard_normal((sum(LENGTHS), config.vocab_size), np.float32))
    return lambda params: jnp.mean(oxjax.step(params, state, batch, config)[0][: sum(LENGTHS)] * weights)


def moved(params, along, step):
    return jax.tree.map(lambda p, v: p + step * v, params, along)


CASES = [(name, False) for name in (*FILES, *SYNTHETIC)]
CASES += [pytest.param((name, True), marks=pytest.mark.slow) for name in (*FILES, *SYNTHETIC)]


@pytest.mark.parametrize("model", CASES, indirect=True, ids=str)
def test_gradients_are_those_of_finite_differences(model, report, request):
    loss = jax.jit(loss_of(model))
    rng = np.random.default_rng(1)

    def direction(p):
        return jnp.asarray(rng.standard_normal(p.shape, np.float32)) * (jnp.sqrt(jnp.mean(p * p)) + 1e-6)

    along = jax.tree.map(direction, model.params)
    ahead, behind = (loss(moved(model.params, along, step)) for step in (STEP, -STEP))
    difference = float(ahead - behind) / (2 * STEP)
    gradient = jax.jit(jax.grad(loss))(model.params)
    backward = float(sum(jnp.vdot(g, v) for g, v in zip(*map(jax.tree.leaves, (gradient, along)), strict=True)))
    steps = jnp.array([1.0, -2.0])
    forward = jax.vmap(lambda s: jax.jvp(lambda s: loss(moved(model.params, along, s)), (0.0 * s,), (s,))[1])(steps)
    report(f"{request.node.name} {backward:.6g} {float(forward[0]):.6g} {difference:.6g}")
    np.testing.assert_allclose(backward * steps, forward, rtol=1e-4)
    np.testing.assert_allclose(difference, backward, rtol=2e-2)
