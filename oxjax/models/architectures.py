"""Every architecture by its `general.architecture` name: one module each."""

from __future__ import annotations

from typing import Any, Protocol

from oxjax.config import LayerSpec, ModelConfig
from oxjax.models import (
    arcee,
    arwkv7,
    baichuan,
    bloom,
    codeshell,
    cohere2,
    command_r,
    exaone,
    exaone4,
    falcon,
    falcon_h1,
    gemma,
    gemma2,
    gemma3,
    glm4,
    gpt2,
    gptneox,
    granite,
    granitehybrid,
    internlm2,
    jamba,
    lfm2,
    llama,
    mamba,
    mamba2,
    minicpm,
    mistral3,
    mpt,
    nemotron,
    nemotron_h,
    olmo,
    olmo2,
    orion,
    phi2,
    phi3,
    plamo2,
    qwen,
    qwen2,
    qwen3,
    qwen3next,
    qwen35,
    qwen35moe,
    rwkv6,
    rwkv6qwen2,
    rwkv7,
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
    "arwkv7": arwkv7,
    "baichuan": baichuan,
    "bloom": bloom,
    "codeshell": codeshell,
    "cohere2": cohere2,
    "command-r": command_r,
    "exaone": exaone,
    "exaone4": exaone4,
    "falcon": falcon,
    "falcon-h1": falcon_h1,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "glm4": glm4,
    "gpt2": gpt2,
    "gptneox": gptneox,
    "granite": granite,
    "granitehybrid": granitehybrid,
    "internlm2": internlm2,
    "jamba": jamba,
    "lfm2": lfm2,
    "llama": llama,
    "mamba": mamba,
    "mamba2": mamba2,
    "minicpm": minicpm,
    "mistral3": mistral3,
    "mpt": mpt,
    "nemotron": nemotron,
    "nemotron_h": nemotron_h,
    "olmo": olmo,
    "olmo2": olmo2,
    "orion": orion,
    "phi2": phi2,
    "phi3": phi3,
    "plamo2": plamo2,
    "qwen": qwen,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen35": qwen35,
    "qwen35moe": qwen35moe,
    "qwen3next": qwen3next,
    "rwkv6": rwkv6,
    "rwkv6qwen2": rwkv6qwen2,
    "rwkv7": rwkv7,
    "seed_oss": seed_oss,
    "smollm3": smollm3,
    "stablelm": stablelm,
    "starcoder": starcoder,
    "starcoder2": starcoder2,
    "xverse": xverse,
}
