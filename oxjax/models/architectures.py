"""Every architecture by its `general.architecture` name: one module each."""

from __future__ import annotations

from typing import Any, Protocol

from oxjax.config import LayerSpec, ModelConfig
from oxjax.models import (
    arcee,
    baichuan,
    bert,
    bloom,
    codeshell,
    cohere2,
    command_r,
    exaone,
    exaone4,
    falcon,
    gemma,
    gemma2,
    gemma3,
    glm4,
    gpt2,
    gptneox,
    granite,
    internlm2,
    jina_bert_v2,
    llama,
    minicpm,
    mistral3,
    modern_bert,
    mpt,
    nemotron,
    nomic_bert,
    olmo,
    olmo2,
    orion,
    phi2,
    phi3,
    qwen,
    qwen2,
    qwen3,
    seed_oss,
    smollm3,
    stablelm,
    starcoder,
    starcoder2,
    t5,
    t5encoder,
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

    # Encoders have, instead of a block, `FINAL_NORM`: the tensor that norms what the last one gives, or None.
    def block(self, *args: Any) -> Any:
        """`block(p, x, state, spec, ctx)`: residual rows and state in, both out (see `layers.transformer`)."""


ARCHITECTURES: dict[str, Any] = {
    "arcee": arcee,
    "baichuan": baichuan,
    "bloom": bloom,
    "codeshell": codeshell,
    "cohere2": cohere2,
    "command-r": command_r,
    "exaone": exaone,
    "exaone4": exaone4,
    "falcon": falcon,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "glm4": glm4,
    "gpt2": gpt2,
    "gptneox": gptneox,
    "granite": granite,
    "internlm2": internlm2,
    "llama": llama,
    "minicpm": minicpm,
    "mistral3": mistral3,
    "mpt": mpt,
    "nemotron": nemotron,
    "olmo": olmo,
    "olmo2": olmo2,
    "orion": orion,
    "phi2": phi2,
    "phi3": phi3,
    "qwen": qwen,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "seed_oss": seed_oss,
    "smollm3": smollm3,
    "stablelm": stablelm,
    "starcoder": starcoder,
    "starcoder2": starcoder2,
    "xverse": xverse,
    # Encoders.
    "bert": bert,
    "jina-bert-v2": jina_bert_v2,
    "modern-bert": modern_bert,
    "nomic-bert": nomic_bert,
    "t5": t5,
    "t5encoder": t5encoder,
}
