"""Every architecture by its `general.architecture` name: one module each."""

from __future__ import annotations

from typing import Any, Protocol

from oxjax.config import LayerSpec, ModelConfig
from oxjax.models import (
    arcee,
    baichuan,
    bailingmoe2,
    bloom,
    codeshell,
    cohere2,
    command_r,
    dbrx,
    deepseek,
    deepseek2,
    ernie4_5_moe,
    exaone,
    exaone4,
    falcon,
    gemma,
    gemma2,
    gemma3,
    glm4,
    glm4moe,
    gpt2,
    gpt_oss,
    gptneox,
    granite,
    granitemoe,
    grok,
    internlm2,
    llama,
    llama4,
    minicpm,
    minicpm3,
    minimax_m2,
    mistral3,
    mpt,
    nemotron,
    olmo,
    olmo2,
    olmoe,
    orion,
    phi2,
    phi3,
    phimoe,
    qwen,
    qwen2,
    qwen2moe,
    qwen3,
    qwen3moe,
    seed_oss,
    smollm3,
    stablelm,
    starcoder,
    starcoder2,
    xverse,
)
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader


class Architecture(Protocol):
    """What a module under `oxjax/models` provides."""

    def config(self, hp: Hyperparameters, tensors: ParamLoader) -> Any:
        """Metadata to `ModelConfig`, and the float32 rotation frequencies of its `ropes`."""

    def layer(self, tensors: ParamLoader, i: int, spec: LayerSpec, config: ModelConfig) -> Any:
        """Parameters of block `i`."""

    def block(self, *args: Any) -> Any:
        """`block(p, x, state, spec, ctx)`: residual rows and state in, both out (see `layers.transformer`)."""


ARCHITECTURES: dict[str, Any] = {
    "arcee": arcee,
    "baichuan": baichuan,
    "bailingmoe2": bailingmoe2,
    "bloom": bloom,
    "codeshell": codeshell,
    "cohere2": cohere2,
    "command-r": command_r,
    "dbrx": dbrx,
    "deepseek": deepseek,
    "deepseek2": deepseek2,
    "ernie4_5-moe": ernie4_5_moe,
    "exaone": exaone,
    "exaone4": exaone4,
    "falcon": falcon,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "glm4": glm4,
    "glm4moe": glm4moe,
    "gpt-oss": gpt_oss,
    "gpt2": gpt2,
    "gptneox": gptneox,
    "granite": granite,
    "granitemoe": granitemoe,
    "grok": grok,
    "internlm2": internlm2,
    "llama": llama,
    "llama4": llama4,
    "minicpm": minicpm,
    "minicpm3": minicpm3,
    "minimax-m2": minimax_m2,
    "mistral3": mistral3,
    "mpt": mpt,
    "nemotron": nemotron,
    "olmo": olmo,
    "olmo2": olmo2,
    "olmoe": olmoe,
    "orion": orion,
    "phi2": phi2,
    "phi3": phi3,
    "phimoe": phimoe,
    "qwen": qwen,
    "qwen2": qwen2,
    "qwen2moe": qwen2moe,
    "qwen3": qwen3,
    "qwen3moe": qwen3moe,
    "seed_oss": seed_oss,
    "smollm3": smollm3,
    "stablelm": stablelm,
    "starcoder": starcoder,
    "starcoder2": starcoder2,
    "xverse": xverse,
}
