"""Recurrent architectures against llama.cpp on random files: numbers of heads, groups and experts, kernels, options.

The files of `test_parity` have one set of hyper-parameters each.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oxjax
from tests.helpers.cuts import same_bits_however_cut
from tests.helpers.oracle import LlamaCpp
from tests.helpers.parity_loop import load
from tests.helpers.recurrent_synth import CASES, plamo2, plamo_mamba, write

CHUNKS = [32, 32]  # one shape to compile, and a past to go on from
IDS = np.random.default_rng(1).integers(3, 500, sum(CHUNKS))
QUICK = ["falcon-h1: without norm", "plamo2: shapes", "lfm2moe", "nemotron_h_moe: layers that differ"]
QUICK += ["kimi-linear", "rwkv6: shapes", "rwkv6qwen2: grouped", "rwkv7: shapes", "arwkv7: no gate"]


def our_logits(path, exact):
    model = load(path, exact=exact)
    state = oxjax.init_state(model.config, n_pages=5, page_size=16, n_slots=3)
    step, at, found = jax.jit(oxjax.step, static_argnames="config"), 0, []
    for i, n in enumerate(CHUNKS):
        rows = np.arange(at, at + n)
        batch = oxjax.Batch(
            tokens=jnp.asarray(IDS[rows], jnp.int32),
            positions=jnp.asarray(rows, jnp.int32),
            cu_q_lens=jnp.array([0, n], jnp.int32),
            kv_lens=jnp.array([at + n], jnp.int32),
            block_tables=jnp.array([[1, 2, 3, 4]], jnp.int32),
            read_slots=jnp.array([1 + i % 2], jnp.int32),
            write_slots=jnp.array([2 - i % 2], jnp.int32),
            logits_rows=jnp.arange(n, dtype=jnp.int32),
        )
        logits, state = step(model.params, state, batch, config=model.config)
        found.append(np.asarray(logits))
        at += n
    return np.concatenate(found)


def test_plamo2_without_heads_on_the_first_block(data, tmp_path):
    """llama.cpp would not return from such a file, which is what the converter writes."""
    models = []
    for heads in ([4, 4, 0], [0, 4, 0]):
        keys, blocks = plamo2(plamo_mamba(), [4, 4, 0], [0, 2, 0])
        write(tmp_path / "a.gguf", "plamo2", keys | {"attention.head_count": heads}, blocks, data / "archs/llama.gguf")
        models.append(oxjax.load(tmp_path / "a.gguf"))
    assert models[0].config == models[1].config
    assert models[0].config.ropes[0].dim == 16


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
def test_random_files_match_llama_cpp(data, tmp_path, report, name):
    path = tmp_path / "model.gguf"
    write(path, name.split(":")[0], *CASES[name], data / "archs" / "llama.gguf")
    with LlamaCpp(path, vocab_only=False) as oracle:
        expected = oracle.logits(IDS.tolist())
    errors = [np.abs(our_logits(path, exact) - expected).max() / expected.std() for exact in (True, False)]
    shown = f"exact {errors[0]:.1e}, fast {errors[1]:.1e}"
    report(f"parity {name.split(':')[0]} (random, {name}): {shown} of the logits' std, allowed 1e-4")
    assert max(errors) <= 1e-4


SLOW = ["plamo2", "rwkv6", "rwkv7", "arwkv7", "lfm2moe", "nemotron_h_moe: layers that differ"]
CUT = ["kimi-linear", "rwkv6: shapes", "rwkv6qwen2: grouped", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)]


@pytest.mark.parametrize("name", CUT)
def test_exact_bits_do_not_depend_on_the_cut(data, tmp_path, name):
    """What `test_recurrence` has no files of."""
    path = tmp_path / "model.gguf"
    write(path, name.split(":")[0], *CASES[name], data / "archs" / "llama.gguf")
    same_bits_however_cut(oxjax.load(path))
