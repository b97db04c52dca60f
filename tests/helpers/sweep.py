"""What the synthetic sweep tries: recipes with other hyper-parameters, each by `<architecture>: <what differs>`.

A case comes with the recipe whose answer it must change, if metadata alone sets them apart.
"""

from __future__ import annotations

import dataclasses

from tests.helpers.synth import PRE, RECIPES, Experts, Latent, Recipe

Case = tuple[str, Recipe, Recipe | None]

_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
_NOT_ROTATED = ("baichuan", "bloom", "gpt2", "mpt", "starcoder")
_SMALL = {"d_model": 32, "d_ff": 32}  # for many layers
_ROTATIONS = {
    "freq_base": {"rope.freq_base": 500.0},
    "linear": {"rope.scaling.type": "linear", "rope.scaling.factor": 3.0},
    "linear by default": {"rope.scaling.factor": 3.0},
    "linear, old key": {"rope.scale_linear": 3.0},
    "yarn": _YARN,
    "yarn, attn_factor": {**_YARN, "rope.scaling.attn_factor": 0.7},
}
_WINDOWS = {
    "window": {"attention.sliding_window": 5},
    "pattern": {"attention.sliding_window_pattern": 3},
    "pattern array": {"attention.sliding_window_pattern": [False, True, True, False]},
}
_R = RECIPES
_EXAONE = _R["exaone4"].but({"attention.sliding_window": 9}, layers=64, **_SMALL)
_MISTRAL = _R["mistral3"].but(_YARN)
_MPT_LEARNED = _R["mpt"].but({"attention.max_alibi_bias": 0.0})

# By architecture and name: keys that alone must change the answer.
_KEYS: dict[str, dict[str, dict]] = {
    "cohere2": {"logit scale": {"logit_scale": 3.0}},
    "command-r": {"logit scale": {"logit_scale": 3.0}},
    "gemma2": {"cap": {"attn_logit_softcapping": 2.0}, "final cap": {"final_logit_softcapping": 2.0}},
    "gemma3": {"sliding base": {"rope.freq_base_swa": 300.0}, "final cap": {"final_logit_softcapping": 2.0}},
    "glm4": {
        "sections": {"rope.dimension_sections": [2, 1, 1, 0]},
        "rope_dim": {"rope.dimension_count": 4},
    },
    "gptneox": {"sequential": {"use_parallel_residual": False}, "rope_dim": {"rope.dimension_count": 4}},
    "granite": {
        "score scale": {"attention.scale": 0.05},
        "embedding scale": {"embedding_scale": 3.0},
        "branch scale": {"residual_scale": 0.3},
        "logit scale": {"logit_scale": 2.0},
        "no rotation": {"rope.scaling.finetuned": False},
    },
    "dbrx": {"clamp": {"attention.clamp_kqv": 0.3}},
    "deepseek": {"scale": {"expert_weights_scale": 3.0}},
    "glm4moe": {"rope_dim": {"rope.dimension_count": 4}},
    "granitemoe": {
        "score scale": {"attention.scale": 0.05},
        "embedding scale": {"embedding_scale": 3.0},
        "branch scale": {"residual_scale": 0.3},
        "logit scale": {"logit_scale": 2.0},
        "no rotation": {"rope.scaling.finetuned": False},
    },
    "grok": {
        "score scale": {"attention.output_scale": 0.3},
        "embedding scale": {"embedding_scale": 3.0},
        "logit scale": {"logit_scale": 2.0},
        "cap": {"attn_logit_softcapping": 0.5},
        "final cap": {"final_logit_softcapping": 2.0},
    },
    "llama4": {
        "pattern": {"attention.sliding_window_pattern": [True, False, False, False], "rope.freq_base_swa": 300.0},
    },
    "minimax-m2": {"rope_dim": {"rope.dimension_count": 4}, "softmax": {"expert_gating_func": 1}},
    "minicpm": {
        "embedding scale": {"embedding_scale": 3.0},
        "branch scale": {"residual_scale": 0.3},
        "logit scale": {"logit_scale": 2.0},
    },
    "mistral3": {
        "temperature": {"attention.temperature_scale": 0.5, "rope.scaling.original_context_length": 16},
    },
    "mpt": {
        "clamp": {"attention.clamp_kqv": 0.8},
        "no positions": {"attention.max_alibi_bias": 0.0},
        "max bias": {"attention.max_alibi_bias": 3.0},
    },
    "nemotron": {"rope_dim": {"rope.dimension_count": 4}},
    "olmo": {"clamp": {"attention.clamp_kqv": 0.8}},
    "phi2": {"rope_dim": {"rope.dimension_count": 4}},
    "phi3": {"rope_dim": {"rope.dimension_count": 8}},
    "stablelm": {"rope_dim": {"rope.dimension_count": 8}},
}

# What the router does. In llama4, where every expert reads its weight times the row, one is used.
_ROUTING = {
    "one used": {"expert_used_count": 1},
    "five used": {"expert_used_count": 5},
    "groups": {"expert_group_count": 4, "expert_group_used_count": 2},
    "groups of four": {"expert_group_count": 2, "expert_group_used_count": 1},
}
_WEIGHTS = {
    "weights as they are": {"expert_weights_norm": False},
    "scale": {"expert_weights_scale": 0.5},
    "softmax": {"expert_gating_func": 1},
}
_LOG = {"rope.scaling.yarn_log_multiplier": 0.0707}
_V2, _GPT_OSS, _LLAMA4 = _R["deepseek2"], _R["gpt-oss"], _R["llama4"]
_YARN_V2 = _V2.but(_YARN)
_BARE = {key: value for key, value in _V2.keys.items() if "gating" not in key and "weights" not in key}


def _mixed(arch: str, keys: dict | None = None, **changes) -> Recipe:
    """The recipe with other experts."""
    r = _R[arch]
    return r.but(keys, experts=dataclasses.replace(r.experts or Experts(), **changes))


_MIXTURES: list[Case] = [
    ("mixture", _mixed("llama"), None),
    ("mixture, shared, merged", _mixed("deepseek2", merged=True), None),
    ("no dense layers", _mixed("deepseek2", {"leading_dense_block_count": 0}, dense=0), None),
    ("two dense layers", _mixed("deepseek", {"leading_dense_block_count": 2}, dense=2), None),
    ("one shared", _mixed("glm4moe", {"expert_shared_count": 1}, shared=48), None),
    ("shared", _mixed("granitemoe", {"expert_shared_feed_forward_length": 40}, shared=40), None),
    (
        "shared width",
        _mixed("bailingmoe2", {"expert_shared_feed_forward_length": 40}, shared=80),
        None,
    ),
    ("16 experts", _mixed("qwen3moe", n=16), None),
    ("6 experts", _mixed("qwen2moe", n=6), None),
    ("without head norms", _R["glm4moe"].but(qk_norm=None), None),
    ("not shared", _mixed("ernie4_5-moe", {"expert_shared_feed_forward_length": 0}, shared=0), None),
    ("no selection bias", _mixed("ernie4_5-moe", score_correction_bias=False), None),
    ("widths from feed_forward_length", _R["qwen3moe"].but({"expert_feed_forward_length": 0}, d_ff=144), None),
    ("narrow", _mixed("grok", {"expert_feed_forward_length": 48}, d_ff=48), None),
    ("Grok 2", _mixed("grok", beside=True), None),
    (
        "Grok 2, post_ffw_norm",
        _mixed("grok", beside=True).but(norms=("attn_norm", "attn_output_norm", "ffn_norm", "post_ffw_norm")),
        None,
    ),
    ("128 experts", _mixed("llama4", n=128), None),
    ("a mixture on every layer", _mixed("llama4", {"interleave_moe_layer_step": 1}, every=1), None),
    ("layers without positions", _LLAMA4.but(layers=9), None),
    ("window", _GPT_OSS.but({"attention.sliding_window": 5}), _GPT_OSS),
    ("pattern", _GPT_OSS.but({"attention.sliding_window_pattern": 3}), _GPT_OSS),
    ("sliding base", _GPT_OSS.but({"rope.freq_base_swa": 300.0}), _GPT_OSS),
    ("full rank", _V2.but(latent=Latent(q_rank=0)), None),
    ("old", _V2.but(kv_heads=4, latent=Latent(split=False)), None),
    ("old, full rank, yarn", _YARN_V2.but(_LOG, kv_heads=4, latent=Latent(q_rank=0, split=False)), None),
    ("wide rotation", _V2.but(latent=Latent(nope=8, rope=16, value=12, kv_rank=20)), None),
    ("six heads", _V2.but(heads=6, latent=Latent(value=16)), None),
    ("log multiplier", _YARN_V2.but(_LOG), _YARN_V2),
    ("log multiplier of one", _YARN_V2.but({"rope.scaling.yarn_log_multiplier": 0.1}), _YARN_V2.but(_LOG)),
    ("log multiplier, attn_factor", _YARN_V2.but({**_LOG, "rope.scaling.attn_factor": 0.7}), _YARN_V2.but(_LOG)),
    ("temperature", _V2.but({"attention.temperature_scale": 0.5, "attention.temperature_length": 16}), _V2),
    ("V2", dataclasses.replace(_mixed("deepseek2", score_correction_bias=False), keys=_BARE), None),
    ("untied", _V2.but(untied=True), None),
    ("ranks", _R["minicpm3"].but(latent=Latent(q_rank=40, kv_rank=16, split=False)), None),
]  # fmt: skip

_SPECIAL: list[Case] = [
    *_MIXTURES,
    ("32 layers, rotated", _R["baichuan"].but(layers=32, **_SMALL), None),
    ("40 layers, ALiBi", _R["baichuan"].but(layers=40, **_SMALL), None),
    ("5 heads", _R["bloom"].but(heads=5, kv_heads=5, d_model=80), None),
    ("plus", _R["command-r"].but(layers=64, qk_norm="heads", **_SMALL), None),
    ("64 layers", _EXAONE, None),
    ("64 layers, window", _EXAONE.but({"attention.sliding_window": 20}), _EXAONE),
    ("64 layers, pattern", _EXAONE.but({"attention.sliding_window_pattern": 3}), _EXAONE),
    ("two norms", _R["falcon"].but(norms=("attn_norm", "attn_norm_2")), None),
    ("beta_fast", _MISTRAL.but({"rope.scaling.yarn_beta_fast": 1.5}), _MISTRAL),
    ("beta_slow", _MISTRAL.but({"rope.scaling.yarn_beta_slow": 0.1}), _MISTRAL),
    ("log multiplier", _MISTRAL.but({"rope.scaling.yarn_log_multiplier": 0.6}), _MISTRAL),
    (
        "everything",
        _R["mpt"].but(
            {"attention.clamp_kqv": 1.5},
            heads=6,
            kv_heads=3,
            d_model=96,
            positions=True,
            norm_bias=True,
            qkv_bias="fused",
            out_bias=True,
            mlp_bias=True,
        ),
        None,
    ),
    ("learned positions", _MPT_LEARNED.but(positions=True), None),
    ("window", _R["olmo2"].but({"attention.sliding_window": 9, **_YARN}, layers=5), None),
    (
        "window, pattern",
        _R["olmo2"].but({"attention.sliding_window": 9, "attention.sliding_window_pattern": [True, False]}),
        None,
    ),
    ("12B", _R["stablelm"].but(norms=("attn_norm",), qk_norm="heads"), None),
    ("parallel", _R["stablelm"].but(norms=("attn_norm",)), None),
    ("norms of heads", _R["stablelm"].but(norms=PRE, qk_norm="heads"), None),
]


def _common(arch: str, r: Recipe) -> list[Case]:
    """What every architecture reads that has it."""
    epsilon = f"attention.layer_norm_{'rms_' if r.norm == 'rms' else ''}epsilon"
    cases: list[Case] = [("epsilon", r.but({epsilon: 1.0}), r)]
    if arch not in _NOT_ROTATED:
        cases += [(name, r.but(keys), r) for name, keys in _ROTATIONS.items()]
    if r.kv_heads not in (1, r.heads) and r.latent is None:
        cases += [
            ("6 heads by 3", r.but(heads=6, kv_heads=3, d_model=96), None),
            ("one kv head", r.but(kv_heads=1), None),
        ]
    if r.experts:
        cases += [(name, r.but(keys), r) for name, keys in _ROUTING.items() if (arch, name) != ("llama4", "one used")]
    if "expert_weights_norm" in r.keys:
        cases += [(name, r.but(keys), r) for name, keys in _WEIGHTS.items()]
    if arch in ("cohere2", "gemma2", "gemma3"):
        deep = r.but(layers=4)
        cases += [(name, deep.but(keys), deep) for name, keys in _WINDOWS.items()]
    return cases + [(name, r.but(keys), r) for name, keys in _KEYS.get(arch, {}).items()]


def _tensors() -> list[Case]:
    """The same architectures with other tensors."""
    changes = {
        ("llama", "exaone4", "granite", "minicpm", "mistral3"): {"rope_freqs": {"rope_freqs": True}},
        ("llama", "granite", "minicpm", "mistral3"): {
            "biases": {"qkv_bias": "split", "out_bias": True, "mlp_bias": True},
        },
        ("glm4", "internlm2", "llama", "olmo2", "qwen2", "stablelm"): {
            "fused": {"fused_qkv": True, "qkv_bias": "fused"},
            "fused, split biases": {"fused_qkv": True, "qkv_bias": "split"},
        },
        ("glm4", "llama", "mistral3", "qwen3", "smollm3"): {"head_dim": {"head_dim": 24}},
        ("bloom", "falcon", "glm4", "gpt2", "granite", "minicpm", "mpt", "olmo", "starcoder", "starcoder2"): {
            "untied": {"untied": True},
        },
        ("exaone4", "glm4"): {"nextn": {"layers": 4, "nextn": 1}},
        ("nemotron",): {"biases": {"qkv_bias": "split", "out_bias": True, "mlp_bias": True}},
    }
    return [
        (name, RECIPES[arch].but(**fields), None)
        for archs, named in changes.items()
        for arch in archs
        for name, fields in named.items()
    ]


def sweep() -> dict[str, tuple[Recipe, Recipe | None]]:
    """All cases by name."""
    cases = [case for arch, r in RECIPES.items() for case in _common(arch, r)] + _tensors() + _SPECIAL
    found = {f"{recipe.arch}: {name}": (recipe, base) for name, recipe, base in cases}
    assert len(found) == len(cases)
    return found
