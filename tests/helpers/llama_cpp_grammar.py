"""llama.cpp's grammar sampler along given tokens, in a process of its own: see `oracle`."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np


def allowed(vocab: Path, walks: list[tuple[str, list[int]]]) -> list[np.ndarray]:
    """What the grammar of each walk allows before its first token and after every one: bool `[1 + tokens, vocab]`."""
    from tests.helpers.oracle import require_llama_cpp

    require_llama_cpp()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out.npz"
        command = [sys.executable, __file__, vocab, target]
        subprocess.run(command, input=json.dumps(walks), text=True, check=True, timeout=600)
        with np.load(target) as found:
            return [found[f"arr_{i}"] for i in range(len(walks))]


def _main(vocab: str, target: str) -> None:
    from llama_cpp import llama_cpp as c

    silent = c.llama_log_callback(lambda *_: None)
    c.llama_log_set(silent, None)
    params = c.llama_model_default_params()
    params.vocab_only = True
    model = c.llama_model_load_from_file(vocab.encode(), params)
    words = c.llama_model_get_vocab(model)
    size = c.llama_vocab_n_tokens(words)
    np.savez(target, *[_walk(c, words, size, grammar, tokens) for grammar, tokens in json.load(sys.stdin)])
    os._exit(0)  # its own end may crash


def _walk(c, words, size: int, grammar: str, tokens: list[int]) -> np.ndarray:
    sampler = c.llama_sampler_init_grammar(words, grammar.encode(), b"root")
    if not sampler:
        raise ValueError(f"llama.cpp refuses {grammar!r}")
    rows = []
    for token in [None, *tokens]:
        if token is not None:
            c.llama_sampler_accept(sampler, token)
        data = np.zeros(size, [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        data["id"] = np.arange(size)
        pointer = data.ctypes.data_as(ctypes.POINTER(c.llama_token_data))
        candidates = c.llama_token_data_array(pointer, size, -1, False)
        c.llama_sampler_apply(sampler, ctypes.byref(candidates))
        kept = np.zeros(size, bool)
        kept[data["id"][np.isfinite(data["logit"])]] = True
        rows.append(kept)
    c.llama_sampler_free(sampler)
    return np.stack(rows)


if __name__ == "__main__":
    _main(*sys.argv[1:])
