"""Recurrent architectures against llama.cpp on random files: numbers of heads, groups and experts, kernels, options.

The files of `test_parity` have one set of hyper-parameters each.
"""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuts import same_bits_however_cut
from oracle import LlamaCpp

import oxjax

D, VOCAB, FF, LAYERS = 64, 512, 96, 3
CHUNKS = [32, 32]  # one shape to compile, and a past to go on from
IDS = np.random.default_rng(1).integers(3, 500, sum(CHUNKS))
ATTENTION = {"attention.head_count": 4, "attention.head_count_kv": 2}
EXPERTS = {"expert_count": 6, "expert_used_count": 2}


def mamba(inner=2 * D, state=16, rank=4, kernel=4, low_norm=False):
    keys = {"inner_size": inner, "state_size": state, "time_step_rank": rank, "conv_kernel": kernel}
    tensors = {
        "ssm_in.weight": (2 * inner, D),
        "ssm_conv1d.weight": (inner, kernel),
        "ssm_conv1d.bias": (inner,),
        "ssm_x.weight": (rank + 2 * state, inner),
        "ssm_dt.weight": (inner, rank),
        "ssm_dt.bias": (inner,),
        "ssm_a": (inner, state),
        "ssm_d": (inner,),
        "ssm_out.weight": (D, inner),
    }
    if low_norm:
        tensors |= {"ssm_dt_norm.weight": (rank,), "ssm_b_norm.weight": (state,), "ssm_c_norm.weight": (state,)}
    return {f"ssm.{k}": v for k, v in keys.items()}, tensors


def mamba2(inner=2 * D, state=16, heads=8, groups=2, kernel=4, norm=True):
    channels = inner + 2 * groups * state
    keys = {"inner_size": inner, "state_size": state, "time_step_rank": heads, "conv_kernel": kernel}
    tensors = {
        "ssm_in.weight": (inner + channels + heads, D),
        "ssm_conv1d.weight": (channels, kernel),
        "ssm_conv1d.bias": (channels,),
        "ssm_dt.bias": (heads,),
        "ssm_a": (heads, 1),
        "ssm_d": (heads, 1),
        "ssm_out.weight": (D, inner),
    }
    if norm:
        tensors["ssm_norm.weight"] = (groups, inner // groups)
    return {f"ssm.{k}": v for k, v in keys.items()} | {"ssm.group_count": groups}, tensors


def plamo_mamba(inner=2 * D, state=16, heads=8, kernel=4):
    keys = {"inner_size": inner, "state_size": state, "time_step_rank": heads, "conv_kernel": kernel, "group_count": 0}
    tensors = {
        "ssm_in.weight": (2 * inner, D),
        "ssm_conv1d.weight": (inner, kernel),
        "ssm_x.weight": (2 * state + 64, inner),
        "ssm_dt.weight": (heads, 64),
        "ssm_dt.bias": (heads,),
        "ssm_a": (heads,),
        "ssm_d": (heads,),
        "ssm_dt_norm": (64,),
        "ssm_b_norm": (state,),
        "ssm_c_norm": (state,),
        "ssm_out.weight": (D, inner),
    }
    return {f"ssm.{k}": v for k, v in keys.items()}, tensors


def delta_net(key_heads=2, heads=4, dim=32, kernel=4, form="split"):
    qkv, inner = (2 * key_heads + heads) * dim, heads * dim
    keys = {"inner_size": inner, "state_size": dim, "time_step_rank": heads, "conv_kernel": kernel}
    tensors = {
        "ssm_conv1d.weight": (qkv, kernel),
        "ssm_dt.bias": (heads,),
        "ssm_a": (heads,),
        "ssm_norm.weight": (dim,),
        "ssm_out.weight": (D, inner),
    }
    if form == "legacy":
        tensors["ssm_in.weight"] = (qkv + inner, D)
    else:
        tensors |= {"attn_qkv.weight": (qkv, D), "attn_gate.weight": (inner, D)}
    if form == "qwen35":
        tensors |= {"ssm_beta.weight": (heads, D), "ssm_alpha.weight": (heads, D)}
    else:
        tensors["ssm_ba.weight"] = (2 * heads, D)
    return {f"ssm.{k}": v for k, v in keys.items()} | {"ssm.group_count": key_heads}, tensors


def attention(heads=4, kv_heads=2, dim=16, gated=False):
    found = {"q": (heads * dim * (2 if gated else 1), D), "k": (kv_heads * dim, D), "v": (kv_heads * dim, D)}
    found = {f"attn_{n}.weight": shape for n, shape in found.items()} | {"attn_output.weight": (D, heads * dim)}
    return found | ({"attn_q_norm.weight": (dim,), "attn_k_norm.weight": (dim,)} if gated else {})


def mlp(d_ff=FF, suffix="", d=D):
    return {f"ffn_{n}{suffix}.weight": (d_ff, d) for n in ("gate", "up")} | {f"ffn_down{suffix}.weight": (d, d_ff)}


def experts(d_ff, shared=0, gated=False, merged=False, n=6):
    up = {"ffn_gate_up_exps.weight": (n, 2 * d_ff, D)} if merged else {
        "ffn_gate_exps.weight": (n, d_ff, D), "ffn_up_exps.weight": (n, d_ff, D)}  # fmt: skip
    found = {"ffn_gate_inp.weight": (n, D), **up, "ffn_down_exps.weight": (n, D, d_ff)}
    found |= mlp(shared, "_shexp") if shared else {}
    return found | ({"ffn_gate_inp_shexp.weight": (D,)} if gated else {})


def short_conv(kernel=3):
    found = {"conv": (D, kernel), "in_proj": (3 * D, D), "out_proj": (D, D)}
    return {"shortconv.l_cache": kernel}, {f"shortconv.{n}.weight": shape for n, shape in found.items()}


def layer_norms(d):
    return {f"{norm}.{part}": (d,) for norm in ("attn_norm", "attn_norm_2") for part in ("weight", "bias")}


def channel_mix(d):
    found = {"lerp_k": (d,), "key": (FF, d), "value": (d, FF)}
    return {f"channel_mix_{n}.weight": shape for n, shape in found.items()}


def rwkv6(head_dim=16, mix=8, decay=12, fused=True, **keys):
    mix_keys = {"time_mix_extra_dim": mix, "time_decay_extra_dim": decay, "wkv.head_size": head_dim}
    block = time_mix6(head_dim, mix, decay, fused) | {
        "time_mix_first.weight": (D // head_dim, head_dim),
        "time_mix_ln.weight": (D,),
        "time_mix_ln.bias": (D,),
        "channel_mix_lerp_r.weight": (D,),
        "channel_mix_receptance.weight": (D, D),
    }
    return NO_HEADS | mix_keys | keys, [block | channel_mix(D) | layer_norms(D)] * LAYERS


def time_mix6(head_dim, mix, decay, fused=True, d_kv=D):
    shares = {"fused": (5, 1, 1, D)} if fused else dict.fromkeys("wkvrg", (D,))
    maps = {"key": (d_kv, D), "value": (d_kv, D)} | dict.fromkeys(("receptance", "gate", "output"), (D, D))
    low = {"w1": (5 * mix, D), "w2": (5, D, mix), "decay": (D,), "decay_w1": (decay, D), "decay_w2": (D, decay)}
    found = {f"time_mix_lerp_{n}.weight": shape for n, shape in ({"x": (D,)} | shares).items()}
    return found | {f"time_mix_{n}.weight": shape for n, shape in (maps | low).items()}


def rwkv6qwen2(head_dim=16, kv_heads=4, mix=8, decay=12, biases=True):
    counts = {"attention.head_count": 0, "attention.head_count_kv": kv_heads, "token_shift_count": 1}
    mix_keys = {"time_mix_extra_dim": mix, "time_decay_extra_dim": decay, "wkv.head_size": head_dim}
    d_kv = kv_heads * head_dim or D
    block = NORMS | mlp() | time_mix6(head_dim, mix, decay, d_kv=d_kv)
    if biases:
        block |= {"time_mix_key.bias": (d_kv,), "time_mix_value.bias": (d_kv,), "time_mix_receptance.bias": (D,)}
    return FED | counts | mix_keys, [block] * LAYERS


# RWKV-7's scan in llama.cpp writes past heads that are no multiple of 64, and so past its memory.
def time_mix7(d, decay, rate, mix, gate, i, norm=True):
    ranks = {"w": decay, "a": rate, "v": mix if i else rate} | ({"g": gate} if gate else {})
    found = {"lerp_fused": (6 if gate else 5, 1, 1, d)} | dict.fromkeys(
        ("receptance", "key", "value", "output"), (d, d)
    )
    found |= {f"{n}1": (rank, d) for n, rank in ranks.items()} | {f"{n}2": (d, rank) for n, rank in ranks.items()}
    found |= dict.fromkeys(("w0", "a0", "v0", "k_k", "k_a", "r_k"), (d,)) | ({"ln": (d,)} if norm else {})
    found = {f"time_mix_{n}.weight": shape for n, shape in found.items()}
    return found | ({"time_mix_ln.bias": (d,)} if norm else {})


def rwkv7_keys(d, head_dim, decay, rate, mix, gate):
    ranks = {"decay": decay, "iclr": rate, "value_residual_mix": mix, "gate": gate}
    keys = {"wkv.head_size": head_dim, "embedding_length": d, "attention.head_count": 0}
    return keys | {f"attention.{n}_lora_rank": rank for n, rank in ranks.items()}


def rwkv7(d=2 * D, head_dim=64, decay=8, rate=12, mix=4, gate=16):
    common = channel_mix(d) | layer_norms(d)
    blocks = [time_mix7(d, decay, rate, mix, gate, i) | common for i in range(LAYERS)]
    return NO_HEADS | rwkv7_keys(d, head_dim, decay, rate, mix, gate), blocks


def arwkv7(d=2 * D, head_dim=64, decay=8, rate=12, mix=4, gate=16, norm=True):
    common = {"attn_norm.weight": (d,), "ffn_norm.weight": (d,)} | mlp(d=d)
    blocks = [time_mix7(d, decay, rate, mix, gate, i, norm) | common for i in range(LAYERS)]
    return FED | {"token_shift_count": 1} | rwkv7_keys(d, head_dim, decay, rate, mix, gate), blocks


NO_ATTENTION = {"attention.head_count": 0, "feed_forward_length": 0}
FED = {"feed_forward_length": FF}
NO_HEADS = FED | {"attention.head_count": 0, "attention.layer_norm_epsilon": 1e-5}
NORMS = {"attn_norm.weight": (D,), "ffn_norm.weight": (D,)}
QWEN_NORMS = {"attn_norm.weight": (D,), "post_attention_norm.weight": (D,)}
QWEN_KEYS = ATTENTION | FED | {"attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": 4}
QWEN_EXPERTS = EXPERTS | {"expert_feed_forward_length": 40, "expert_shared_feed_forward_length": 48}
SECTIONS = {"rope.dimension_sections": [1, 1, 0, 0]}


def pure(mixer, **keys):
    return NO_ATTENTION | mixer[0] | keys, [{"attn_norm.weight": (D,)} | mixer[1]] * LAYERS


def alternating(mixer, feed, **keys):
    """Recurrent, attention, recurrent, as `head_count_kv` tells."""
    keys = ATTENTION | FED | mixer[0] | {"attention.head_count_kv": [0, 2, 0]} | keys
    return keys, [NORMS | (mixer[1] if i != 1 else attention()) | feed for i in range(LAYERS)]


def lfm2(mixer, **keys):
    keys, blocks = alternating(mixer, mlp(), **keys)
    blocks[1] |= {"attn_q_norm.weight": (16,), "attn_k_norm.weight": (16,)}
    return keys, blocks


def plamo2(mixer, heads, kv_heads, dim=16, **keys):
    """Attention where there are heads of keys; llama.cpp needs some number of query heads on the first block."""
    n, n_kv = heads[0], max(kv_heads)
    attended = {
        "attn_qkv.weight": ((n + 2 * n_kv) * dim, D),
        "attn_output.weight": (D, n * dim),
        "attn_q_norm.weight": (n, dim),
        "attn_k_norm.weight": (n_kv, dim),
    }
    after = {"post_attention_norm": (D,), "post_ffw_norm": (D,)}
    feed = {"ffn_up.weight": (2 * FF, D), "ffn_down.weight": (D, FF)}
    counts = {"attention.head_count": heads, "attention.head_count_kv": kv_heads}
    lengths = dict.fromkeys(("attention.key_length", "attention.value_length"), dim)
    blocks = [NORMS | after | feed | (attended if n else mixer[1]) for n in kv_heads]
    return FED | mixer[0] | counts | lengths | keys, blocks


def one_thing_each(mixer, **keys):
    """An MLP, then Mamba-2, then attention."""
    up_down = {"ffn_up.weight": (FF, D), "ffn_down.weight": (D, FF)}
    blocks = [{"attn_norm.weight": (D,)} | block for block in (up_down, mixer[1], attention())]
    lengths = {"feed_forward_length": [FF, 0, 0], "attention.head_count_kv": [0, 0, 2]}
    return ATTENTION | mixer[0] | lengths | {"attention.layer_norm_epsilon": 1e-5} | keys, blocks


def qwen(mixer, feed, recurrent=(True, False, True), **keys):
    """With an attention layer in the middle instead of every fourth."""
    blocks = [QWEN_NORMS | (mixer[1] if r else attention(gated=True)) | feed for r in recurrent]
    return QWEN_KEYS | mixer[0] | {"attention.recurrent_layers": list(recurrent)} | keys, blocks


def side_by_side(mixer, **keys):
    blocks = [{"attn_norm.weight": (D,), "ffn_norm": (D,)} | mixer[1] | attention() | mlp()] * LAYERS
    return ATTENTION | FED | mixer[0] | keys, blocks


CASES = {
    "mamba": pure(mamba()),
    "mamba: shapes": pure(mamba(state=8, rank=7, kernel=3)),
    "mamba: unit norms": pure(mamba(), **{"ssm.dt_b_c_rms": True}),
    "mamba2": pure(mamba2()),
    "mamba2: one group": pure(mamba2(groups=1, kernel=2)),
    "mamba2: a group per head": pure(mamba2(inner=192, groups=4, heads=4, state=24)),
    "jamba: dense": alternating(mamba(low_norm=True), mlp()),
    "jamba: experts": alternating(mamba(low_norm=True, kernel=3), experts(FF), **EXPERTS),
    "falcon-h1": side_by_side(mamba2(inner=96, groups=1)),
    "falcon-h1: without norm": side_by_side(mamba2(norm=False), **{"rope.freq_base": 5e5}),
    "granitehybrid: no rotation": alternating(
        mamba2(groups=1), mlp(), **{"rope.scaling.finetuned": False, "attention.scale": 0.1}
    ),
    "granitehybrid: experts": alternating(
        mamba2(groups=4), experts(FF, shared=40), **EXPERTS,
        **{"expert_shared_feed_forward_length": 40, "residual_scale": 0.3, "logit_scale": 3.0, "embedding_scale": 5.0},
    ),
    "lfm2": lfm2(short_conv()),
    "lfm2: window": lfm2(short_conv(4), **{"attention.sliding_window": 20}),
    "nemotron_h": one_thing_each(mamba2()),
    "plamo2": plamo2(plamo_mamba(), [4, 4, 0], [0, 2, 0]),
    "plamo2: shapes": plamo2(plamo_mamba(96, 24, 3, 3), [6, 6, 6], [0, 2, 2], 24),
    "plamo2: first is attention": plamo2(plamo_mamba(64, 8, 8), [4, 0, 0], [4, 0, 0]),
    "plamo2: rotated": plamo2(
        plamo_mamba(64, 8, 8), [4, 4, 4], [0, 0, 1], 32, **{"rope.freq_base": 500.0, "rope.dimension_count": 16}
    ),
    "qwen3next": qwen(delta_net(), experts(40, 48, gated=True), **QWEN_EXPERTS),
    "qwen3next: legacy": qwen(delta_net(form="legacy"), experts(40, 48, gated=True), **QWEN_EXPERTS),
    "qwen3next: one key head": qwen(delta_net(1, 4, 16), experts(40, 48, gated=True, merged=True), **QWEN_EXPERTS),
    "qwen35": qwen(delta_net(form="qwen35"), mlp(), **SECTIONS),
    "qwen35: equal heads": qwen(delta_net(4, 4, 16, 3, form="qwen35"), mlp(), (False, True, True), **SECTIONS),
    "qwen35: tiled": qwen(delta_net(2, 6, 16, form="qwen35"), mlp(), **SECTIONS),
    "qwen35moe": qwen(
        delta_net(form="qwen35"), experts(40, 48, gated=True, merged=True), **QWEN_EXPERTS, **SECTIONS
    ),
    "rwkv6": rwkv6(),
    "rwkv6: shapes": rwkv6(head_dim=32, mix=5, decay=7, fused=False),
    "rwkv6: halved": rwkv6(head_dim=8, rescale_every_n_layers=2),
    "rwkv6qwen2": rwkv6qwen2(),
    "rwkv6qwen2: grouped": rwkv6qwen2(head_dim=8, kv_heads=2, mix=6),
    "rwkv6qwen2: no count": rwkv6qwen2(head_dim=32, kv_heads=0, decay=5, biases=False),
    "rwkv7": rwkv7(),
    "rwkv7: shapes": rwkv7(192, decay=5, rate=7, mix=9, gate=3),
    "rwkv7: one head": rwkv7(head_dim=128),
    "arwkv7": arwkv7(),
    "arwkv7: no gate": arwkv7(gate=0),
    "arwkv7: no norm": arwkv7(64, rate=6, norm=False),
}  # fmt: skip
QUICK = ["falcon-h1: without norm", "plamo2: shapes"]
QUICK += ["rwkv6: shapes", "rwkv6qwen2: grouped", "rwkv7: shapes", "arwkv7: no gate"]


def numbers(rng, name, shape):
    noise = rng.standard_normal(shape, np.float32)
    if name.endswith("ssm_a"):
        return -np.exp(noise)
    if "lerp" in name:
        return 0.5 + 0.3 * noise
    if ("norm" in name or "_ln." in name) and not name.endswith("bias"):
        return 1 + 0.3 * noise
    plain = ("ssm_d", "_first.weight", "decay.weight", "0.weight", "_k.weight", "k_a.weight")
    if "embd" in name or name.endswith(plain):
        return noise - 2 * name.endswith("decay.weight")  # some channels remember for long
    if name.endswith("bias") or "conv1d" in name or "shortconv.conv" in name:
        return 0.5 * noise
    return noise / np.float32(np.sqrt(shape[-1]))


def write(path, arch, keys, blocks, tokenizer_of):
    writer = gguf.GGUFWriter(path, arch)
    common = {"context_length": 256, "embedding_length": D, "block_count": LAYERS, "vocab_size": VOCAB}
    for key, value in (common | {"attention.layer_norm_rms_epsilon": 1e-5} | keys).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        add[type(value)](f"{arch}.{key}", value)
    for field in gguf.GGUFReader(tokenizer_of).fields.values():
        if field.name.startswith("tokenizer."):
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=sub)
    rng = np.random.default_rng(0)
    final_norm = "token_embd_norm" if arch == "lfm2" else "output_norm"
    d = keys.get("embedding_length", D)
    shapes = {"token_embd.weight": (VOCAB, d), f"{final_norm}.weight": (d,)}
    if arch.startswith(("rwkv", "arwkv")):
        shapes["output.weight"] = (VOCAB, d)
    if arch in ("rwkv6", "rwkv7"):
        shapes |= dict.fromkeys(("token_embd_norm.weight", "token_embd_norm.bias", "output_norm.bias"), (d,))
    for i, block in enumerate(blocks):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(name, numbers(rng, name, shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def our_logits(path, exact):
    model = oxjax.load(path, exact=exact)
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


CUT = [
    "plamo2",
    "rwkv6: shapes",
    "rwkv6qwen2: grouped",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("rwkv6", "rwkv7", "arwkv7")),
]


@pytest.mark.parametrize("name", CUT)
def test_exact_bits_do_not_depend_on_the_cut(data, tmp_path, name):
    """What `test_recurrence` has no files of."""
    path = tmp_path / "model.gguf"
    write(path, name.split(":")[0], *CASES[name], data / "archs" / "llama.gguf")
    same_bits_however_cut(oxjax.load(path))
