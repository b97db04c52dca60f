"""Small random float32 GGUF files of any transformer architecture, written with the `gguf` package.

A `Recipe` says which tensors a family has and which metadata beyond the common; llama.cpp refuses a file with a
tensor too many or too few, so a recipe that it loads is one of its architecture.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import gguf
import numpy as np

PRE = ("attn_norm", "ffn_norm")
POST = ("post_attention_norm", "post_ffw_norm")


@dataclass(frozen=True)
class Experts:
    """A mixture of experts and where it stands; how many are used is 3 unless the metadata says otherwise."""

    n: int = 8
    d_ff: int = 96
    bias: bool = False  # of router and experts
    score_correction_bias: bool = False
    shared: int = 0  # width of the expert that all rows use
    shared_gate: bool = False
    merged: bool = False  # gate and up in one
    beside: bool = False  # a dense network besides, as in Grok 2
    dense: int = 0  # layers at the beginning without
    every: int = 1
    place: int = -1  # which of `every` layers


@dataclass(frozen=True)
class Latent:
    """Latent attention; in new files the matrices of keys and values are split."""

    q_rank: int = 24
    kv_rank: int = 32
    nope: int = 16
    rope: int = 8
    value: int = 20
    split: bool = True


@dataclass(frozen=True)
class Recipe:
    """One file. `keys` are metadata under the architecture's prefix, over those that all files have."""

    arch: str
    d_model: int = 64
    d_ff: int = 96
    heads: int = 4
    kv_heads: int = 2
    layers: int = 2
    head_dim: int | None = None  # written as key_length and value_length where it is given
    norm: str = "rms"
    norms: tuple[str, ...] = PRE
    norm_bias: bool = False
    output_norm: bool = True
    qk_norm: str | None = None  # head, heads or whole
    fused_qkv: bool = False
    qkv_bias: str | None = None  # fused or split
    out_bias: bool = False
    mlp: str = "gated"  # gated, plain, or fused: gate and up in one
    mlp_bias: bool = False
    untied: bool = False
    output_bias: bool = False
    positions: bool = False
    embedding_norm: bool = False
    rope_freqs: bool = False
    experts: Experts | None = None
    latent: Latent | None = None
    sinks: bool = False
    nextn: int = 0  # of the layers, how many at the end predict further tokens
    head: dict[str, tuple[int, ...]] = field(default_factory=dict)  # tensors under `cls`
    keys: dict[str, Any] = field(default_factory=dict)

    def but(self, keys: dict[str, Any] | None = None, **changes: Any) -> Recipe:
        """The same with other fields, and with `keys` added."""
        return dataclasses.replace(self, **changes, keys={**self.keys, **(keys or {})})

    def tensors(self, vocab: int, context: int) -> dict[str, tuple[int, ...]]:
        """Every tensor of the file."""
        return shapes(self, vocab, context)


def shapes(r: Recipe, vocab: int, context: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the file, `[d_out, d_in]` for matrices."""
    d, dim = r.d_model, r.head_dim or r.d_model // r.heads
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, d)}
    for i in range(r.layers):
        found.update({f"blk.{i}.{name}": shape for name, shape in _block(r, dim, i).items()})
        if i >= r.layers - r.nextn:
            found[f"blk.{i}.nextn.eh_proj.weight"] = (d, 2 * d)
            found |= {f"blk.{i}.nextn.{name}.weight": (d,) for name in ("enorm", "hnorm")}
    if r.positions:
        found["position_embd.weight"] = (context, d)
    if r.rope_freqs:
        found["rope_freqs.weight"] = (r.keys.get("rope.dimension_count", dim) // 2,)
    if r.embedding_norm:
        found |= _tensor("token_embd_norm", (d,), r.norm_bias)
    if r.output_norm:
        found |= _tensor("output_norm", (d,), r.norm_bias)
    if r.untied:
        found |= _tensor("output", (vocab, d), r.output_bias)
    return found | {f"cls{name}": shape for name, shape in r.head.items()}


def _tensor(name: str, shape: tuple[int, ...], bias: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, **({f"{name}.bias": shape[:1]} if bias else {})}


def _block(r: Recipe, dim: int, i: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name in r.norms:
        found |= _tensor(name, (r.d_model,), r.norm_bias)
    found |= _attention(r, dim) if r.latent is None else _latent(r, r.latent)
    if r.experts is None or i < r.experts.dense or (i - r.experts.place) % r.experts.every:
        return found | _mlp(r, r.d_ff)
    return found | _mixture(r, r.experts)


def _mlp(r: Recipe, d_ff: int, suffix: str = "") -> dict[str, tuple[int, ...]]:
    gate = _tensor(f"ffn_gate{suffix}", (d_ff, r.d_model), r.mlp_bias) if r.mlp == "gated" else {}
    up = _tensor(f"ffn_up{suffix}", (d_ff * (2 if r.mlp == "fused" else 1), r.d_model), r.mlp_bias)
    return gate | up | _tensor(f"ffn_down{suffix}", (r.d_model, d_ff), r.mlp_bias)


def _mixture(r: Recipe, e: Experts) -> dict[str, tuple[int, ...]]:
    found = _tensor("ffn_gate_inp", (e.n, r.d_model), e.bias)
    names = ("up",) if r.mlp == "plain" else ("gate", "up")
    maps = {"gate_up": (2 * e.d_ff, r.d_model)} if e.merged else dict.fromkeys(names, (e.d_ff, r.d_model))
    for name, shape in {**maps, "down": (r.d_model, e.d_ff)}.items():
        found[f"ffn_{name}_exps.weight"] = (e.n, *shape)
        if e.bias:
            found[f"ffn_{name}_exps.bias"] = (e.n, shape[0])
    if e.score_correction_bias:
        found["exp_probs_b.bias"] = (e.n,)
    if e.shared:
        found |= _mlp(r, e.shared, "_shexp")
    if e.shared_gate:
        found["ffn_gate_inp_shexp.weight"] = (r.d_model,)
    return found | (_mlp(r, r.d_ff) if e.beside else {})


def _latent(r: Recipe, a: Latent) -> dict[str, tuple[int, ...]]:
    d, q = r.d_model, r.heads * (a.nope + a.rope)
    found = {"attn_q.weight": (q, d)}
    if a.q_rank:
        found = {
            "attn_q_a.weight": (a.q_rank, d),
            "attn_q_a_norm.weight": (a.q_rank,),
            "attn_q_b.weight": (q, a.q_rank),
        }
    found |= {"attn_kv_a_mqa.weight": (a.kv_rank + a.rope, d), "attn_kv_a_norm.weight": (a.kv_rank,)}
    if a.split:
        found["attn_k_b.weight"] = (r.heads, a.kv_rank, a.nope)
        found["attn_v_b.weight"] = (r.heads, a.value, a.kv_rank)
    else:
        found["attn_kv_b.weight"] = (r.heads * (a.nope + a.value), a.kv_rank)
    return found | {"attn_output.weight": (d, r.heads * a.value)}


def latent_keys(a: Latent) -> dict[str, int]:
    """What describes it; split files give the head dimensions that the cache sees in the common keys."""
    widths = {"key_length": a.nope + a.rope, "value_length": a.value}
    keys = {"kv_lora_rank": a.kv_rank, "q_lora_rank": a.q_rank}
    if a.split:
        keys |= {f"{name}_mla": width for name, width in widths.items()}
        widths = {"key_length": a.kv_rank + a.rope, "value_length": a.kv_rank}
    return {f"attention.{name}": n for name, n in (keys | widths).items()} | {"rope.dimension_count": a.rope}


def _attention(r: Recipe, dim: int) -> dict[str, tuple[int, ...]]:
    d, heads = r.d_model, {"q": r.heads, "k": r.kv_heads, "v": r.kv_heads}
    found: dict[str, tuple[int, ...]] = {}
    if r.fused_qkv:
        found |= _tensor("attn_qkv", (sum(heads.values()) * dim, d), r.qkv_bias == "fused")
    for n, count in heads.items():
        if not r.fused_qkv:
            found[f"attn_{n}.weight"] = (count * dim, d)
        if r.qkv_bias == "split":
            found[f"attn_{n}.bias"] = (count * dim,)
        if r.qk_norm and n != "v":
            shape = {"head": (dim,), "heads": (count, dim), "whole": (count * dim,)}[r.qk_norm]
            found |= _tensor(f"attn_{n}_norm", shape, r.norm_bias and r.qk_norm == "whole")
    if r.sinks:
        found["attn_sinks.weight"] = (r.heads,)
    return found | _tensor("attn_output", (d, r.heads * dim), r.out_bias)


def numbers(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values of a size that lets every part of the model be seen in the logits."""
    noise = rng.standard_normal(shape, np.float32)
    if name.startswith("rope_freqs"):
        return 1 + np.abs(noise)
    if "norm" in name:
        return 1 + 0.3 * noise if name.endswith("weight") else 0.3 * noise
    if name.endswith("bias"):
        return 0.3 * noise
    if "embd" in name:
        return noise
    gain = 2.0 if any(part in name for part in ("attn_q", "attn_k")) else 1.0  # scores that tell keys apart
    gain = 8.0 if "attn_rel_b" in name else gain  # beside scores without a scale
    return gain * noise / np.float32(np.sqrt(shape[-1]))


def write(path, recipe: Recipe, tokenizer_of, *, seed: int = 0, tokenizer: dict[str, str] | None = None):
    """Write the file.

    Args:
        path: where to.
        recipe: what.
        tokenizer_of: a GGUF file whose tokenizer metadata the new one gets.
        seed: of the weights, which depend on nothing but it, their name and their shape.
        tokenizer: texts under `tokenizer.` besides.

    Returns:
        `path`.
    """
    writer = gguf.GGUFWriter(path, recipe.arch)
    keys: dict[str, Any] = {
        "context_length": 256,
        "embedding_length": recipe.d_model,
        "block_count": recipe.layers,
        "feed_forward_length": recipe.d_ff,
        "attention.head_count": recipe.heads,
        "attention.head_count_kv": recipe.kv_heads,
        f"attention.layer_norm_{'rms_' if recipe.norm == 'rms' else ''}epsilon": 1e-5,
        **({"nextn_predict_layers": recipe.nextn} if recipe.nextn else {}),
        **({} if recipe.head_dim is None else dict.fromkeys(LENGTHS, recipe.head_dim)),
        **({} if recipe.experts is None else {"expert_count": recipe.experts.n, "expert_used_count": 3}),
        **({} if recipe.latent is None else latent_keys(recipe.latent)),
        **recipe.keys,
    }
    for key, value in keys.items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        add[type(value)](f"{recipe.arch}.{key}", value)
    reader = gguf.GGUFReader(tokenizer_of)
    for name, stored in reader.fields.items():
        if name.startswith("tokenizer."):
            if stored.types[0] == gguf.GGUFValueType.ARRAY:
                writer.add_array(name, stored.contents())
            else:
                writer.add_key_value(name, stored.contents(), stored.types[0])
    for name, text in (tokenizer or {}).items():
        writer.add_string(f"tokenizer.{name}", text)
    vocab = len(reader.fields["tokenizer.ggml.tokens"].contents())
    for name, shape in recipe.tensors(vocab, keys["context_length"]).items():
        rng = np.random.default_rng([seed, *name.encode()])
        writer.add_tensor(name, numbers(rng, name, shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LENGTHS = ("attention.key_length", "attention.value_length")
_LAYER_NORMED = {"norm": "layer", "norm_bias": True}
_BIASED = {"qkv_bias": "fused", "fused_qkv": True, "out_bias": True, "mlp_bias": True}
_LIKE_GPT2 = {**_LAYER_NORMED, **_BIASED, "mlp": "plain", "kv_heads": 4}

_MIX, _NARROW = Experts(), {"expert_feed_forward_length": 48}
_AFTER_ATTENTION = ("attn_norm", "post_attention_norm")
_DEEPSEEK = {
    **_NARROW,
    "expert_shared_count": 2,
    "leading_dense_block_count": 1,
    "expert_weights_norm": True,
    "expert_weights_scale": 2.5,
    "expert_gating_func": 2,
}
_AFTER_DENSE = Experts(d_ff=48, shared=96, dense=1, score_correction_bias=True)

RECIPES = {
    r.arch: r
    for r in (
        Recipe("llama"),
        Recipe("arcee", mlp="plain"),
        Recipe("baichuan", untied=True),
        Recipe(
            "bailingmoe2", fused_qkv=True, qk_norm="head", untied=True, layers=3, experts=_AFTER_DENSE, keys=_DEEPSEEK
        ),
        Recipe("bloom", **_LIKE_GPT2, embedding_norm=True),
        Recipe(
            "cohere2",
            norm="layer",
            norms=("attn_norm",),
            layers=4,
            keys={"attention.sliding_window": 16, "logit_scale": 0.25},
        ),
        Recipe("command-r", norm="layer", norms=("attn_norm",), keys={"logit_scale": 0.25}),
        Recipe("codeshell", **{**_LIKE_GPT2, "kv_heads": 2}, untied=True),
        Recipe(
            "dbrx",
            norm="layer",
            norms=("attn_norm", "attn_output_norm"),
            fused_qkv=True,
            untied=True,
            experts=_MIX,
            keys={"attention.clamp_kqv": 0.8},
        ),
        Recipe(
            "deepseek",
            layers=3,
            experts=dataclasses.replace(_AFTER_DENSE, score_correction_bias=False),
            keys={**_NARROW, "expert_shared_count": 2, "leading_dense_block_count": 1, "expert_weights_scale": 1.5},
        ),
        Recipe("deepseek2", kv_heads=1, layers=3, latent=Latent(), experts=_AFTER_DENSE, keys=_DEEPSEEK),
        Recipe(
            "ernie4_5-moe",
            layers=4,
            experts=Experts(d_ff=48, shared=64, dense=1, every=1, score_correction_bias=True),
            keys={
                **_NARROW,
                "expert_shared_feed_forward_length": 64,
                "leading_dense_block_count": 1,
                "interleave_moe_layer_step": 1,
            },
        ),
        Recipe("exaone"),
        Recipe("exaone4", norms=POST, qk_norm="head"),
        Recipe("falcon", **_LAYER_NORMED, fused_qkv=True, norms=("attn_norm",), mlp="plain", kv_heads=1),
        Recipe("gemma", head_dim=24),
        Recipe("gemma2", norms=PRE + POST, head_dim=24, keys={"attention.sliding_window": 16}),
        Recipe(
            "gemma3",
            norms=PRE + POST,
            qk_norm="head",
            head_dim=24,
            keys={"attention.sliding_window": 16, "attention.sliding_window_pattern": 2},
        ),
        Recipe("glm4", norms=PRE + POST, mlp="fused", keys={"rope.dimension_count": 8}),
        Recipe(
            "glm4moe",
            norms=_AFTER_ATTENTION,
            layers=3,
            qk_norm="head",
            qkv_bias="split",
            experts=_AFTER_DENSE,
            keys={**_DEEPSEEK, "rope.dimension_count": 8},
        ),
        Recipe(
            "gpt-oss",
            norms=_AFTER_ATTENTION,
            qkv_bias="split",
            out_bias=True,
            untied=True,
            sinks=True,
            experts=Experts(d_ff=48, bias=True),
            keys={**_NARROW, "attention.sliding_window": 16},
        ),
        Recipe("gpt2", **_LIKE_GPT2, positions=True),
        Recipe("gptneox", **_LIKE_GPT2, untied=True, keys={"rope.dimension_count": 8, "use_parallel_residual": True}),
        Recipe("granite", keys={"logit_scale": 4.0}),
        Recipe("granitemoe", experts=_MIX, keys={"logit_scale": 4.0}),
        Recipe(
            "grok",
            norms=("attn_norm", "attn_output_norm", "ffn_norm", "layer_output_norm"),
            experts=_MIX,
            keys={"embedding_scale": 1.5, "logit_scale": 0.7},
        ),
        Recipe("internlm2", untied=True),
        Recipe(
            "llama4",
            layers=4,
            experts=Experts(d_ff=48, shared=48, every=2),
            keys={**_NARROW, "interleave_moe_layer_step": 2, "expert_used_count": 1},
        ),
        Recipe("minicpm"),
        Recipe("minicpm3", kv_heads=4, latent=Latent(split=False)),
        Recipe(
            "minimax-m2",
            qk_norm="whole",
            untied=True,
            experts=Experts(score_correction_bias=True),
            keys={"expert_feed_forward_length": 96, "expert_gating_func": 2, "rope.dimension_count": 8},
        ),
        Recipe("mistral3"),
        Recipe("mpt", norm="layer", fused_qkv=True, mlp="plain", keys={"attention.max_alibi_bias": 8.0}),
        Recipe("nemotron", **_LAYER_NORMED, mlp="plain", untied=True, keys={"rope.dimension_count": 8}),
        Recipe("olmo", norm="layer", norms=(), output_norm=False),
        Recipe("olmo2", norms=POST, qk_norm="whole", untied=True),
        Recipe(
            "phi2",
            **_LIKE_GPT2,
            norms=("attn_norm",),
            untied=True,
            output_bias=True,
            keys={"rope.dimension_count": 12},
        ),
        Recipe("olmoe", kv_heads=4, qk_norm="whole", untied=True, experts=_MIX),
        Recipe("orion", **_LAYER_NORMED, untied=True),
        Recipe("phi3", fused_qkv=True, mlp="fused"),
        Recipe("qwen", fused_qkv=True, qkv_bias="fused", untied=True, kv_heads=4, keys={"feed_forward_length": 192}),
        Recipe(
            "phimoe",
            norm_bias=True,
            qkv_bias="split",
            out_bias=True,
            untied=True,
            output_bias=True,
            experts=_MIX,
        ),
        Recipe("qwen2", qkv_bias="split"),
        Recipe(
            "qwen2moe",
            qkv_bias="split",
            untied=True,
            experts=Experts(d_ff=48, shared=80, shared_gate=True),
            keys={**_NARROW, "expert_shared_feed_forward_length": 80},
        ),
        Recipe("qwen3", qk_norm="head"),
        Recipe("qwen3moe", qk_norm="head", head_dim=24, experts=Experts(d_ff=48), keys=_NARROW),
        Recipe("seed_oss", norms=("attn_norm", "post_attention_norm"), qkv_bias="split", head_dim=24),
        Recipe("smollm3", layers=5),
        Recipe("stablelm", **_LAYER_NORMED, untied=True, keys={"rope.dimension_count": 4}),
        Recipe("starcoder", **{**_LIKE_GPT2, "kv_heads": 1}, positions=True),
        Recipe("starcoder2", **_LAYER_NORMED, qkv_bias="split", out_bias=True, mlp="plain", mlp_bias=True),
        Recipe("xverse", untied=True),
    )
}
