"""Description of a model file from its header, and of the software that would run it."""

from __future__ import annotations

import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from oxjax.errors import OxjaxError
from oxjax.gguf import GGMLType, GGUFFile, TensorInfo
from oxjax.gguf.planes import PLANE_FORMATS
from oxjax.tokenizer import Tokenizer


def describe(path: str | Path) -> dict[str, Any]:
    """Facts about a GGUF model and the software here, ready for printing or JSON. Sizes are in bytes.

    A part that oxjax cannot use (an unknown architecture or vocabulary) is described by its error.

    Raises:
        GGUFError: the file is not sound.
    """
    with GGUFFile.open(path) as file:
        arch = file.get("general.architecture", str)
        return {
            "file": str(file.path),
            "shards": len(file.paths),
            "format": f"GGUF v{file.version}, {file.byte_order}-endian",
            "name": file.get("general.name", str, ""),
            "architecture": arch,
            "context": file.get(f"{arch}.context_length", int, None),
            "parameters": sum(t.n_elements for t in file.tensors.values()),
            "file_bytes": file.file_size,
            "kernels": _kernels(),
            "software": _software(),
            "tensors": _quantisation(file),
            "model": _or_error(lambda: _model(file)),
            "memory": _or_error(lambda: _memory(file)),
            "tokenizer": _or_error(lambda: _tokenizer(file)),
            "chat_template": _templates(file),
        }


def _kernels() -> str:
    from oxjax.kernels import native

    return native.describe()


def _software() -> dict[str, str]:
    import jax

    versions = {name: version(name) for name in ("oxjax", "jax", "jaxlib", "numpy")}
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {**versions, "python": platform.python_version(), "platform": platform.platform(), "device": device}


def _or_error(part: Any) -> dict[str, Any]:
    try:
        return part()
    except OxjaxError as error:
        return {"error": str(error)}


def _quantisation(file: GGUFFile) -> dict[str, dict[str, int]]:
    mix: dict[str, dict[str, int]] = {}
    for tensor in file.tensors.values():
        entry = mix.setdefault(tensor.ggml_type.name, {"tensors": 0, "parameters": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["parameters"] += tensor.n_elements
        entry["bytes"] += tensor.n_bytes
    return dict(sorted(mix.items(), key=lambda item: -item[1]["bytes"]))


def _config(file: GGUFFile) -> Any:
    from oxjax.models.load import load_config  # brings jax, which the other commands do without

    return load_config(file)


_HEADS = {"heads": "n_heads", "kv_heads": "n_kv_heads", "head_dim": "key_dim"}


def _model(file: GGUFFile) -> dict[str, Any]:
    from oxjax.config import AttentionSpec, RecurrentSpec

    config = _config(file)
    attention = [m for m in config.mixers if isinstance(m, AttentionSpec)]
    facts = {
        "layers": len(config.layers),
        "sliding_window_layers": sum(m.window is not None for m in attention),
        "recurrent_layers": sum(isinstance(m, RecurrentSpec) for m in config.mixers),
        "d_model": config.d_model,
        "d_ff": max((layer.mlp.d_ff for layer in config.layers if layer.mlp is not None), default=0),
        "vocabulary": config.vocab_size,
    }
    if attention:
        facts |= {name: getattr(attention[0], field) for name, field in _HEADS.items()}
    return facts


def _memory(file: GGUFFile) -> dict[str, int]:
    """Bytes of parameters as they are held by default and as float32, and of the rest in float32."""
    config = _config(file)
    per_token = config.page_bytes(1)
    return {
        "parameters": sum(map(_held, file.tensors.values())),
        "parameters_float32": 4 * sum(t.n_elements for t in file.tensors.values()),
        "kv_per_token_float32": per_token,
        "kv_full_context_float32": per_token * config.context_length,
        "state_per_sequence": config.slot_bytes,
    }


def _held(tensor: TensorInfo) -> int:
    """Bytes of a tensor in memory: matrices stay what they are where there are kernels for that, else float32."""
    from oxjax.kernels import native
    from oxjax.kernels.quantized import PANEL, panel_bytes

    if len(tensor.shape) > 1 and native.resolve_backend("auto") == "native":
        if form := PLANE_FORMATS.get(tensor.ggml_type):
            *experts, d_out, d_in = tensor.shape
            return math.prod(experts) * -(-d_out // PANEL) * panel_bytes(d_in, form)
        if tensor.ggml_type in (GGMLType.F16, GGMLType.BF16):
            return tensor.n_bytes
    return 4 * tensor.n_elements


def _tokenizer(file: GGUFFile) -> dict[str, Any]:
    tokenizer = Tokenizer.from_metadata(file.metadata, source=str(file.path))
    return {
        "kind": tokenizer.model,
        "pre": tokenizer.pre,
        "vocabulary": tokenizer.vocab_size,
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "adds_bos": tokenizer.add_bos,
        "adds_eos": tokenizer.add_eos,
        "end_of_generation": sorted(tokenizer.eog_ids),
    }


def _templates(file: GGUFFile) -> list[str]:
    prefix = "tokenizer.chat_template"
    names = (
        k.removeprefix(prefix).removeprefix(".") for k in file.metadata if k == prefix or k.startswith(f"{prefix}.")
    )
    return [name or "default" for name in names]
