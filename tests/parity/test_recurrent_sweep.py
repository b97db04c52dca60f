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
# By default every architecture without a file in `test_parity`, in one mode: exact mode takes twice as long to compile.
EXACT = ["kimi-linear", "rwkv6: shapes", "rwkv7: shapes"]
FAST = ["lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe: layers that differ", "plamo2: shapes", "qwen35moe"]
FAST += ["arwkv7: no gate", "rwkv6qwen2: grouped"]


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


CLOSE = 1e-4
# Here a group of row 48 almost cancels before the last norm (0.03 where others have 1), which magnifies what float32
# rounded: float64 is 1.0e-4 from our logits there and 0.3e-4 from llama.cpp's, and 2e-6 from both in the median row.
CANCELS = {"mamba2: a group per head": 2e-4}
MODES = [
    pytest.param(n, exact, id=f"{n}-{'exact' if exact else 'fast'}", marks=() if n in quick else pytest.mark.slow)
    for n in CASES
    for exact, quick in ((True, EXACT), (False, FAST))
]


@pytest.mark.parametrize(("name", "exact"), MODES)
def test_random_files_match_llama_cpp(data, tmp_path, report, name, exact):
    path = tmp_path / "model.gguf"
    write(path, name.split(":")[0], *CASES[name], data / "archs" / "llama.gguf")
    with LlamaCpp(path, vocab_only=False) as oracle:
        expected = oracle.logits(IDS.tolist())
    error, allowed = np.abs(our_logits(path, exact) - expected).max() / expected.std(), CANCELS.get(name, CLOSE)
    shown = f"{'exact' if exact else 'fast'} {error:.1e}"
    report(f"parity {name.split(':')[0]} (random, {name}): {shown} of the logits' std, allowed {allowed:.0e}")
    assert error <= allowed


SLOW = ["plamo2", "rwkv6", "rwkv7", "arwkv7", "lfm2moe", "nemotron_h_moe: layers that differ"]
CUT = ["kimi-linear", "rwkv6: shapes", "rwkv6qwen2: grouped", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)]


@pytest.mark.parametrize("name", CUT)
def test_exact_bits_do_not_depend_on_the_cut(data, tmp_path, name):
    """What `test_recurrence` has no files of."""
    path = tmp_path / "model.gguf"
    write(path, name.split(":")[0], *CASES[name], data / "archs" / "llama.gguf")
    same_bits_however_cut(oxjax.load(path))
