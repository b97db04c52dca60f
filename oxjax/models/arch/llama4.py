"""llama4 (Llama 4): three layers of chunked attention to one over everything without positions, whose queries grow;
experts on every n-th layer, which read their weight times the row, beside one that all rows use.
"""

from __future__ import annotations

from oxjax.config import ModelConfig, TemperatureSpec
from oxjax.models.base import Frequencies, dense_config, replace_attention, with_sliding_window
from oxjax.models.experts import expert_spec, shared_expert, with_experts
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader

_CHUNK = 8192
_GROWTH = TemperatureSpec(scale=0.1, length=_CHUNK, offset=1)
_UNNORMALISED = 128  # experts of the size whose queries and keys are not normalised
_NO_POSITIONS_EVERY = 4


def config(hp: Hyperparameters, tensors: ParamLoader) -> tuple[ModelConfig, Frequencies]:
    """Metadata to config; files do not state the chunk."""
    if hp.get("attention.sliding_window", int, _CHUNK) == 0:
        raise hp.error("attention.sliding_window", "found 0, but models without chunks are not supported")
    base, frequencies = with_sliding_window(
        hp,
        tensors,
        *dense_config(hp, tensors, pairing="norm"),
        hp.window_layers(default_period=4),
        chunk=_CHUNK,
    )
    d_ff = hp.uniform("expert_feed_forward_length")
    experts = expert_spec(
        hp, d_ff, gating="sigmoid", norm_topk_prob=False, router_weight_on_input=True, shared=shared_expert(d_ff)
    )
    rotated = {"norm_rotated": experts.n_experts != _UNNORMALISED}
    still = {"rope": None, "temperature": _GROWTH}
    changes = (still if (i + 1) % _NO_POSITIONS_EVERY == 0 else rotated for i in range(hp.n_layers))
    every = hp.uniform("interleave_moe_layer_step")
    return with_experts(replace_attention(base, changes), experts, lambda i: (i + 1) % every == 0), frequencies
