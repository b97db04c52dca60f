"""Gradients through whole models on the XLA backend, against finite differences and forward mode."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oxjax
from oxjax.config import MoESpec
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
STEP = 5e-4  # of the finite difference, relative to the parameters' size


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


def outputs_of(model):
    """A function of the parameters: everything that the model gives for the rows of a ragged batch."""
    config = model.config
    if not config.causal:
        tokens = np.concatenate([ids(config.vocab_size, n) for n in (*LENGTHS, 7)])
        texts = Texts(jnp.asarray(tokens, jnp.int32), jnp.asarray(np.cumsum([0, *LENGTHS]), jnp.int32))
        return lambda params: encode(params, texts, config)[: sum(LENGTHS)]
    sequences = [(ids(config.vocab_size, n), [n]) for n in LENGTHS]
    width = -(-max(LENGTHS) // 16)
    batch = Loop.batch(sequences, [0, 0], LENGTHS, 0, width, n_rows=sum(LENGTHS) + 5)
    state = oxjax.init_state(config, n_pages=1 + 2 * width, page_size=16, n_slots=5)
    return lambda params: oxjax.step(params, state, batch, config)[0][: sum(LENGTHS)]


def all_experts(config):
    """Every expert is used: which ones are the best is not differentiable."""

    def widened(layer):
        moe = layer.mlp
        if not isinstance(moe, MoESpec):
            return layer
        return replace(layer, mlp=replace(moe, n_experts_per_token=moe.n_experts, n_groups=1, n_groups_used=1))

    return replace(config, layers=tuple(map(widened, config.layers)))


def moved(params, along, step):
    return jax.tree.map(lambda p, v: p + step * v, params, along)


CASES = [(name, False) for name in (*FILES, *SYNTHETIC)]
CASES += [(name, True) for name in (*FILES, *SYNTHETIC)]
QUICK = {("dense", True), ("MLA with experts", False), ("mamba2", False)}
MARKED = [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize("model", MARKED, indirect=True, ids=str)
def test_gradients_are_those_of_finite_differences(model, report, request):
    config, rng = all_experts(model.config), np.random.default_rng(1)
    outputs = jax.jit(outputs_of(replace(model, config=config)))
    weights = jnp.asarray(rng.standard_normal(jax.eval_shape(outputs, model.params).shape, np.float32))

    def loss(params):
        return jnp.mean(outputs(params) * weights)

    def direction(p):
        return jnp.asarray(rng.standard_normal(p.shape, np.float32)) * (jnp.sqrt(jnp.mean(p * p)) + 1e-6)

    along = jax.tree.map(direction, model.params)
    ahead, behind = (np.asarray(outputs(moved(model.params, along, s)), np.float64) for s in (STEP, -STEP))
    difference = np.mean((ahead - behind) * np.asarray(weights)) / (2 * STEP)

    gradient = jax.jit(jax.grad(loss))(model.params)
    parts = [float(jnp.vdot(g, v)) for g, v in zip(*map(jax.tree.leaves, (gradient, along)), strict=True)]
    scale = np.linalg.norm(parts)  # parameters have a share each, of either sign
    steps = jnp.array([1.0, -2.0])
    forward = jax.vmap(lambda s: jax.jvp(lambda s: loss(moved(model.params, along, s)), (0.0 * s,), (s,))[1])(steps)
    modes, error = abs(forward - sum(parts) * steps).max() / scale, abs(difference - sum(parts)) / scale
    report(f"gradients of {request.node.callspec.id}: {modes:.1e} from forward mode, {error:.1e} from differences")
    # Sums of thousands of float32 terms, in another order.
    assert modes < 1e-4
    # A central difference is off by the third derivative times STEP^2, and by the rounding of outputs over STEP.
    assert error < 1e-2
