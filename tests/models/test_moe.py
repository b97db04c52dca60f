"""Mixtures of experts against a float64 loop over rows, and their bits over every number of rows."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oxjax.config import MLPSpec, MoESpec
from oxjax.gguf import GGUFFile
from oxjax.kernels.numerics import Numerics
from oxjax.models.layers.linear import Linear
from oxjax.models.layers.mlp import MLP
from oxjax.models.layers.moe import Experts, MoE, moe, route
from oxjax.models.load import load_params
from oxjax.models.loader import ParamLoader

E, D, FF, ROWS = 12, 64, 48, 83
PLAIN = MoESpec(E, 3, FF)
KINDS = {
    "plain": PLAIN,
    "one used": dataclasses.replace(PLAIN, n_experts_per_token=1),
    "all used": dataclasses.replace(PLAIN, n_experts_per_token=E),
    "as they are": dataclasses.replace(PLAIN, norm_topk_prob=False, scale=2.5),
    "sigmoid": dataclasses.replace(PLAIN, gating="sigmoid"),
    "softmax_topk": dataclasses.replace(PLAIN, gating="softmax_topk", norm_topk_prob=False, activation="swiglu_oai"),
    "groups": dataclasses.replace(PLAIN, gating="sigmoid", n_groups=4, n_groups_used=2),
    "weighed inputs": dataclasses.replace(
        PLAIN, gating="sigmoid", norm_topk_prob=False, router_weight_on_input=True, n_experts_per_token=2
    ),
    "not gated": dataclasses.replace(PLAIN, gated=False, activation="relu2"),
    "shared": dataclasses.replace(PLAIN, shared=MLPSpec(40, "silu"), output_scale=0.7),
    "latent": dataclasses.replace(PLAIN, shared=MLPSpec(40, "silu"), d_latent=28),
}


def params(spec, *, bias=True, seed=0):
    rng = np.random.default_rng(seed)

    def numbers(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32) / np.sqrt(shape[-2] if len(shape) > 1 else 10))

    def experts(d_in, d_out):
        return Experts(weight=numbers(E, d_in, d_out), bias=numbers(E, d_out) if bias else None)

    shared, d = None, spec.d_latent or D
    if spec.shared is not None:
        wide = spec.shared.d_ff
        shared = MLP(up=Linear(numbers(D, wide)), down=Linear(numbers(wide, D)), gate=Linear(numbers(D, wide)))
    return MoE(
        router=Linear(numbers(D, E), numbers(E)),
        up=experts(d, FF),
        down=experts(FF, d),
        gate=experts(d, FF) if spec.gated else None,
        score_correction_bias=numbers(E)
        if bias and spec.gating == "sigmoid" and not spec.router_weight_on_input
        else None,
        shared=shared,
        shared_gate=None if shared is None else Linear(numbers(D, 1)),
        latent_down=Linear(numbers(D, d)) if spec.d_latent else None,
        latent_up=Linear(numbers(d, D)) if spec.d_latent else None,
    )


def in_float64(node):
    """The same tree as plain namespaces of float64 arrays."""
    if node is None or isinstance(node, jax.Array):
        return None if node is None else np.asarray(node, np.float64)
    return SimpleNamespace(**{name: in_float64(value) for name, value in vars(node).items()})


def textbook(p, x, spec):
    """One row after the other in float64, experts chosen by sorting."""
    p = in_float64(p)
    sigmoid = lambda y: 1.0 / (1.0 + np.exp(-y))  # noqa: E731

    def inner(gate, up):
        if spec.activation == "swiglu_oai":
            gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
            return gate * sigmoid(1.702 * gate) * (up + 1.0)
        return np.square(np.maximum(up, 0.0)) if gate is None else gate * sigmoid(gate) * up

    rows = []
    for row in np.asarray(x, np.float64):
        logits = row @ p.router.weight + p.router.bias
        scores = {"softmax": np.exp(logits) / np.exp(logits).sum(), "sigmoid": sigmoid(logits), "softmax_topk": logits}
        scores = scores[spec.gating]
        ranked = scores if p.score_correction_bias is None else scores + p.score_correction_bias
        groups = ranked.reshape(spec.n_groups, -1)
        worth = np.sort(groups, axis=1)[:, -2:].sum(axis=1)
        allowed = np.argsort(-worth)[: spec.n_groups_used]
        ranked = np.where(np.isin(np.arange(spec.n_groups), allowed)[:, None], groups, -np.inf).ravel()
        chosen = np.argsort(-ranked)[: spec.n_experts_per_token]
        weights = scores[chosen]
        if spec.gating == "softmax_topk":
            weights = np.exp(weights) / np.exp(weights).sum()
        if spec.norm_topk_prob:
            weights = weights / weights.sum()
        read = row if p.latent_down is None else row @ p.latent_down.weight
        total = np.zeros(len(read))
        for e, weight in zip(chosen, weights * spec.scale, strict=True):
            seen = read * weight if spec.router_weight_on_input else read
            gate = None if p.gate is None else seen @ p.gate.weight[e] + p.gate.bias[e]
            given = inner(gate, seen @ p.up.weight[e] + p.up.bias[e]) @ p.down.weight[e] + p.down.bias[e]
            total += given if spec.router_weight_on_input else weight * given
        total = total if p.latent_up is None else total @ p.latent_up.weight
        if p.shared is not None:
            gate = row @ p.shared.gate.weight
            y = (gate * sigmoid(gate) * (row @ p.shared.up.weight)) @ p.shared.down.weight
            total += y * sigmoid(row @ p.shared_gate.weight)
        rows.append(total * spec.output_scale)
    return np.stack(rows)


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(1).standard_normal((ROWS, D), np.float32))


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("name", KINDS)
def test_the_sum_of_the_chosen_experts(numerics, x, name, rows):
    spec, p = KINDS[name], params(KINDS[name])
    # Float32 products of width 64 and 48 and a few sums of size about one, against float64.
    for exact in (True, False):
        got = jax.jit(partial(moe, spec=spec, numerics=dataclasses.replace(numerics, exact=exact)))(p, x[:rows])
        np.testing.assert_allclose(got, textbook(p, x[:rows], spec), rtol=0, atol=1e-5 * (1 + spec.scale))


@pytest.mark.parametrize("name", ["groups", "softmax_topk", "shared", "weighed inputs", "latent"])
def test_bits_of_a_row_do_not_depend_on_its_company(numerics, x, name):
    spec, p = KINDS[name], params(KINDS[name])
    run = jax.jit(lambda x, real: moe(p, x, spec, numerics, is_real=real))
    whole = np.asarray(run(x, jnp.ones(ROWS, bool)))
    shuffled = np.random.default_rng(2).permutation(ROWS)
    np.testing.assert_array_equal(run(x[shuffled], jnp.ones(ROWS, bool)), whole[shuffled])
    for start, rows in ((0, 1), (7, 1), (9, 17), (40, 17)):
        real = jnp.arange(rows + 3) < rows
        padded = jnp.concatenate([x[start : start + rows], 1e30 * jnp.ones((3, D))])
        np.testing.assert_array_equal(run(padded, real)[:rows], whole[start : start + rows])


def test_padding_reads_no_experts(numerics, x):
    """An expert full of NaN that only padding chose leaves no trace."""
    p, spec = params(PLAIN, bias=False), PLAIN
    chosen = np.asarray(route(p, x, spec, numerics)[0])
    bad = int(chosen[0, 0])
    real = jnp.asarray((chosen != bad).all(axis=1))
    assert 0 < int(real.sum()) < ROWS
    poisoned = p.replace(down=Experts(p.down.weight.at[bad].set(jnp.nan)))
    y = np.asarray(moe(poisoned, x, spec, numerics, is_real=real))
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(y[np.asarray(real)], np.asarray(moe(p, x, spec, numerics))[np.asarray(real)])
    assert np.isnan(np.asarray(moe(poisoned, x, spec, numerics))).any()


def test_weights_of_vanishing_scores_stay_finite(x):
    """Sigmoids that underflow: their sum is taken for no less than the smallest normal float16."""
    p = params(dataclasses.replace(PLAIN, gating="sigmoid"), bias=False)
    p = p.replace(router=Linear(p.router.weight, p.router.bias - 200.0))
    weights = route(p, x, dataclasses.replace(PLAIN, gating="sigmoid"), Numerics())[1]
    np.testing.assert_array_equal(weights, 0.0)


def test_old_files_with_a_tensor_for_each_expert(data, tmp_path):
    """The first Mixtral files kept experts apart; the same numbers give the same parameters."""
    import gguf

    source = gguf.GGUFReader(data / "archs" / "mixtral.gguf")
    writer = gguf.GGUFWriter(tmp_path / "old.gguf", "llama")
    for key, field in source.fields.items():
        if key.startswith("llama."):
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in source.tensors:
        if "_exps" not in tensor.name:
            writer.add_tensor(tensor.name, tensor.data)
            continue
        for e, matrix in enumerate(tensor.data):
            writer.add_tensor(tensor.name.replace("_exps", f".{e}"), matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(tmp_path / "old.gguf") as old, GGUFFile.open(data / "archs" / "mixtral.gguf") as new:
        (_, ours), (_, theirs) = load_params(old), load_params(new)
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_experts_with_a_scale_each(tmp_path):
    """`.scale` of a stack has one number per expert (NVFP4 files)."""
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    numbers = np.random.default_rng(0).standard_normal((3, 8, 5), np.float32)
    writer.add_tensor("a_exps.weight", numbers)
    writer.add_tensor("a_exps.scale", np.array([1.0, 0.5, -2.0], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        first, second = ParamLoader(file, "float32").experts("a", 3, 5, (6, 2))
    scaled = (numbers * np.array([1.0, 0.5, -2.0], np.float32)[:, None, None]).swapaxes(1, 2)
    np.testing.assert_array_equal(first.weight, scaled[..., :6])
    np.testing.assert_array_equal(second.weight, scaled[..., 6:])
