"""Small random GGUF files of architectures with recurrent layers: a case is metadata and the tensors of each block."""

import gguf
import numpy as np

D, VOCAB, FF, LAYERS = 64, 512, 96, 3
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


def experts(d_ff, shared=0, gated=False, merged=False, n=6, bias=False):
    up = {"ffn_gate_up_exps.weight": (n, 2 * d_ff, D)} if merged else {
        "ffn_gate_exps.weight": (n, d_ff, D), "ffn_up_exps.weight": (n, d_ff, D)}  # fmt: skip
    found = {"ffn_gate_inp.weight": (n, D), **up, "ffn_down_exps.weight": (n, D, d_ff)}
    found |= mlp(shared, "_shexp") if shared else {}
    found |= {"exp_probs_b.bias": (n,)} if bias else {}
    return found | ({"ffn_gate_inp_shexp.weight": (D,)} if gated else {})


def plain_experts(d_ff, shared, latent=0, n=6):
    d = latent or D
    found = {"ffn_gate_inp.weight": (n, D), "exp_probs_b.bias": (n,)}
    found |= {"ffn_up_exps.weight": (n, d_ff, d), "ffn_down_exps.weight": (n, d, d_ff)}
    found |= {"ffn_up_shexp.weight": (shared, D), "ffn_down_shexp.weight": (D, shared)}
    return found | ({"ffn_latent_down.weight": (d, D), "ffn_latent_up.weight": (D, d)} if latent else {})


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


def lfm2moe(mixer, **keys):
    """Experts on all but the first block."""
    keys, blocks = lfm2(mixer, **EXPERTS, expert_feed_forward_length=40, **keys)
    dense = keys["leading_dense_block_count"]
    blocks = [{n: s for n, s in block.items() if "ffn" not in n} for block in blocks]
    feeds = [mlp() if i < dense else experts(40, bias=True) for i in range(LAYERS)]
    return keys, [block | {"ffn_norm.weight": (D,)} | feed for block, feed in zip(blocks, feeds, strict=True)]


def nemotron_h_moe(mixer, d_ff, shared, latent=0, **keys):
    """Experts, Mamba-2, attention and experts again; widths of the two mixtures."""
    mixtures = [plain_experts(width, shared, latent) for width in d_ff]
    blocks = [{"attn_norm.weight": (D,)} | block for block in (mixtures[0], mixer[1], attention(), mixtures[1])]
    lengths = {"feed_forward_length": [FF, 0, 0, FF], "attention.head_count_kv": [0, 0, 2, 0], "block_count": 4}
    lengths |= {"expert_shared_feed_forward_length": shared, "expert_shared_count": 1, "expert_group_count": 1}
    lengths |= {"moe_latent_size": latent} if latent else {}
    lengths |= {"expert_weights_norm": True, "attention.layer_norm_epsilon": 1e-5}
    return ATTENTION | mixer[0] | EXPERTS | lengths | keys, blocks


def kimi_delta(heads=4, dim=16, kernel=4, fused=False, axes=4):
    """Its convolutions have axes of length one besides: in files as they were converted four axes in all."""
    inner = heads * dim
    conv, rate = {4: ((1, inner, 1, kernel), (1, 1, heads, 1)), 3: ((inner, 1, kernel), (heads, 1))}[axes]
    qkv = {"attn_qkv": (3 * inner, D)} if fused else {f"attn_{n}": (inner, D) for n in "qkv"}
    pairs = {f"ssm_{n}_{end}": shape for n in "fg" for end, shape in (("a", (dim, D)), ("b", (inner, dim)))}
    maps = qkv | pairs | {"ssm_beta": (heads, D), "ssm_norm": (dim,), "attn_output": (D, inner)}
    maps |= {f"ssm_conv1d_{n}": conv for n in "qkv"}
    tensors = {f"{n}.weight": shape for n, shape in maps.items()} | {"ssm_a": rate, "ssm_dt.bias": (inner,)}
    return {"attention.head_count": heads, "kda.head_dim": dim, "ssm.conv_kernel": kernel}, tensors


def kimi(mixer, nope=16, rope=8, value=12, rank=20, shared=1, dense=1, **keys):
    """Recurrent, latent, recurrent."""
    heads = mixer[0]["attention.head_count"]
    latent = {
        "attn_q.weight": (heads * (nope + rope), D),
        "attn_kv_a_mqa.weight": (rank + rope, D),
        "attn_kv_a_norm.weight": (rank,),
        "attn_k_b.weight": (heads, rank, nope),
        "attn_v_b.weight": (heads, value, rank),
        "attn_output.weight": (D, heads * value),
    }
    widths = {"key_length": rank + rope, "value_length": rank, "kv_lora_rank": rank, "head_count_kv": [0, 1, 0]}
    widths |= {"key_length_mla": nope + rope, "value_length_mla": value}
    routing = {"feed_forward_length": 40, "shared_count": shared, "gating_func": 2, "weights_scale": 2.446}
    named = {f"attention.{n}": v for n, v in widths.items()} | {f"expert_{n}": v for n, v in routing.items()}
    named |= {"rope.dimension_count": rope, "leading_dense_block_count": dense}
    feeds = [mlp() if i < dense else experts(40, 40 * shared, bias=True) for i in range(LAYERS)]
    blocks = [NORMS | (latent if i == 1 else mixer[1]) | feed for i, feed in enumerate(feeds)]
    return FED | EXPERTS | mixer[0] | named | keys, blocks


def qwen(mixer, feed, recurrent=(True, False, True), **keys):
    """With an attention layer in the middle instead of every fourth."""
    blocks = [QWEN_NORMS | (mixer[1] if r else attention(gated=True)) | feed for r in recurrent]
    return QWEN_KEYS | mixer[0] | {"attention.recurrent_layers": list(recurrent)} | keys, blocks


def side_by_side(mixer, **keys):
    blocks = [{"attn_norm.weight": (D,), "ffn_norm": (D,)} | mixer[1] | attention() | mlp()] * LAYERS
    return ATTENTION | FED | mixer[0] | keys, blocks


def first(n, case):
    """The first `n` blocks of a case."""
    keys, blocks = case
    by_block = {key: value for key, value in keys.items() if isinstance(value, list) and len(value) == len(blocks)}
    cut = keys | {key: value[:n] for key, value in by_block.items()}
    return cut | {"block_count": n}, blocks[:n]


CASES = {
    "mamba": pure(mamba()),
    "mamba: shapes": pure(mamba(state=8, rank=7, kernel=3)),
    "mamba: unit norms": pure(mamba(), **{"ssm.dt_b_c_rms": True}),
    "mamba2": pure(mamba2()),
    "mamba2: one layer": first(1, pure(mamba2())),
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
    "kimi-linear": kimi(kimi_delta()),
    "kimi-linear: shapes": kimi(kimi_delta(3, 32, 3, axes=3), 12, 4, 20, 24, shared=2, dense=2),
    "kimi-linear: fused": kimi(kimi_delta(2, 64, 2, fused=True), dense=0, expert_gating_func=1),
    "kimi-linear: groups": kimi(kimi_delta(8, 8), expert_group_count=3, expert_group_used_count=2),
    "lfm2": lfm2(short_conv()),
    "lfm2: window": lfm2(short_conv(4), **{"attention.sliding_window": 20}),
    "lfm2moe": lfm2moe(short_conv(), leading_dense_block_count=1, expert_gating_func=2),
    "lfm2moe: no dense layers, softmax": lfm2moe(short_conv(2), leading_dense_block_count=0, expert_gating_func=1),
    "nemotron_h": one_thing_each(mamba2()),
    "nemotron_h_moe": nemotron_h_moe(mamba2(), (40, 40), 48, expert_feed_forward_length=40, expert_weights_scale=2.5),
    "nemotron_h_moe: weights as they are, no width": nemotron_h_moe(
        mamba2(), (48, 48), 32, expert_weights_norm=False
    ),
    "nemotron_h_moe: latent": nemotron_h_moe(mamba2(groups=1), (40, 40), 48, 24, expert_feed_forward_length=40),
    "nemotron_h_moe: layers that differ": nemotron_h_moe(
        mamba2(), (40, 24), 48, 16,
        expert_feed_forward_length=[40, 0, 0, 24], expert_used_count=[4, 0, 0, 2], expert_weights_scale=2.5,
    ),
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
    "qwen35: two layers": first(2, qwen(delta_net(form="qwen35"), mlp(), **SECTIONS)),
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
    "rwkv7: one layer": first(1, rwkv7()),
    "rwkv7: shapes": rwkv7(192, decay=5, rate=7, mix=9, gate=3),
    "rwkv7: one head": rwkv7(head_dim=128),
    "arwkv7": arwkv7(),
    "arwkv7: no gate": arwkv7(gate=0),
    "arwkv7: no norm": arwkv7(64, rate=6, norm=False),
}  # fmt: skip


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
    """Write the file."""
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
    final_norm = "token_embd_norm" if arch.startswith("lfm2") else "output_norm"
    d = keys.get("embedding_length", D)
    shapes = {"token_embd.weight": (VOCAB, d), f"{final_norm}.weight": (d,)}
    if arch.startswith(("rwkv", "arwkv", "kimi")):
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
