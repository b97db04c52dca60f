"""llama.cpp's samplers on given logits, in a process of their own: see `oracle`."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np


def apply(logits: np.ndarray, cases: list[dict[str, Any]]) -> np.ndarray:
    """What samplers make of rows of logits `[N, vocab]`: -inf for tokens that they drop.

    A case has the "sampler"'s name in llama.cpp, its "args", and the tokens that it has "accepted", if any. Biases
    are pairs. DRY has the path of a "vocab" besides, and its breakers last. With "rounds", the sampler is applied so
    often; what it chose each time follows the logits of its row.
    """
    from tests.helpers.oracle import require_llama_cpp

    require_llama_cpp()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "logits.npy", Path(folder) / "out.npy"
        np.save(source, logits)
        command = [sys.executable, __file__, source, target]
        subprocess.run(command, input=json.dumps(cases), text=True, check=True, timeout=300)
        return np.load(target)


@cache
def _vocab(path: str) -> Any:
    from llama_cpp import llama_cpp as c

    _vocab.silent = c.llama_log_callback(lambda *_: None)  # must outlive the library's use of it
    c.llama_log_set(_vocab.silent, None)
    params = c.llama_model_default_params()
    params.vocab_only = True
    return c.llama_model_get_vocab(c.llama_model_load_from_file(path.encode(), params))


def _one(c: Any, logits: np.ndarray, case: dict[str, Any]) -> np.ndarray:
    args = case["args"]
    if case["sampler"] == "dry":
        *args, breakers = args
        texts = (ctypes.c_char_p * len(breakers))(*(b.encode() for b in breakers))
        args = _vocab(case["vocab"]), *args, texts, len(breakers)
    if case["sampler"] == "logit_bias":
        biases = (c.llama_logit_bias * len(args))(*map(tuple, args))
        args = len(logits), len(args), biases
    sampler = getattr(c, f"llama_sampler_init_{case['sampler']}")(*args)
    for token in case.get("accepted", []):
        c.llama_sampler_accept(sampler, token)
    chosen = []
    for _ in range(case.get("rounds", 1)):
        data = (c.llama_token_data * len(logits))(*((i, float(x), 0.0) for i, x in enumerate(logits)))
        candidates = c.llama_token_data_array(data, len(logits), -1, False)
        c.llama_sampler_apply(sampler, ctypes.byref(candidates))
        chosen.append(candidates.data[candidates.selected].id if candidates.selected >= 0 else -1)
    c.llama_sampler_free(sampler)
    out = np.full(len(logits), -np.inf, np.float32)
    for i in range(candidates.size):
        out[candidates.data[i].id] = candidates.data[i].logit
    return np.append(out, np.float32(chosen)) if "rounds" in case else out


def _main(source: str, target: str) -> None:
    from llama_cpp import llama_cpp as c

    rows = zip(np.load(source), json.load(sys.stdin), strict=True)
    np.save(target, np.stack([_one(c, logits, case) for logits, case in rows]))
    os._exit(0)  # its own end may crash


if __name__ == "__main__":
    _main(*sys.argv[1:])
