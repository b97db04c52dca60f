"""Norms against their published formulas in float64."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from oxjax.models.layers.norms import Norm, layer_norm, rms_norm


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("rows", [1, 15, 17])
def test_norms_follow_their_formulas(numerics, exact, rows):
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.standard_normal(s).astype(np.float32) for s in ((rows, 48), 48, 48))
    x = x * 3 + 1
    wide, eps = x.astype(np.float64), 1e-5
    centred = wide - wide.mean(-1, keepdims=True)
    rms = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + eps) * weight
    layer = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps) * weight
    plain, biased = Norm(jnp.asarray(weight)), Norm(jnp.asarray(weight), jnp.asarray(bias))
    options = {"eps": eps, "numerics": replace(numerics, exact=exact)}
    # Float32 sums of 48 terms.
    np.testing.assert_allclose(rms_norm(plain, jnp.asarray(x), **options), rms, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer_norm(plain, jnp.asarray(x), **options), layer, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer_norm(biased, jnp.asarray(x), **options), layer + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("exact", [True, False])
def test_heads_may_have_weights_of_their_own_or_none(numerics, exact):
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(s).astype(np.float32) for s in ((5, 3, 16), (3, 16)))
    options = {"eps": 1e-5, "numerics": replace(numerics, exact=exact)}
    plain = np.asarray(layer_norm(Norm(), jnp.asarray(x), **options))
    centred = x - x.mean(-1, keepdims=True, dtype=np.float64)
    expected = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(plain, expected, rtol=1e-5, atol=1e-5)
    weighted = layer_norm(Norm(jnp.asarray(weight)), jnp.asarray(x), **options)
    np.testing.assert_allclose(weighted, expected * weight, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        weighted[:, 1], layer_norm(Norm(jnp.asarray(weight[1])), jnp.asarray(x[:, 1]), **options)
    )
