"""llama.cpp as an oracle, in a process of its own.

llama-cpp-python may crash when its interpreter exits and aborts on files it does not like; a worker that answers
JSON lines keeps that out of the tests. The class below runs this file; workers are used again, one model after the
other, because starting one takes half a second.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np


def require_llama_cpp() -> None:
    """Skip a test without the oracle package; fail in CI."""
    from tests.helpers.extras import require

    require("llama_cpp", "oracle")


class LlamaCpp:
    """One model of llama.cpp. Use as a context manager, or call `close`.

    Raises:
        RuntimeError: llama.cpp refused the file or died.
    """

    _idle: ClassVar[list[subprocess.Popen]] = []

    def __init__(self, path: str | Path, vocab_only: bool = True):
        require_llama_cpp()
        self._worker = self._idle.pop() if self._idle else _start()
        try:
            self.vocab_size = self._ask("open", str(path), vocab_only)
        except RuntimeError:
            self.close()
            raise

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the worker back; the last ones end with the session."""
        if self._worker.poll() is None:
            self._idle.append(self._worker)
        else:
            _end(self._worker)

    def _ask(self, method: str, *args: object):
        try:
            self._worker.stdin.write(json.dumps([method, *args]) + "\n")
            self._worker.stdin.flush()
            line = self._worker.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"llama.cpp died in {method} with exit status {self._worker.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"llama.cpp: {method}: {answer['error']}")
        return answer["ok"]

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        return self._ask("tokenize", [text], add_special, parse_special)[0]

    def tokenize_all(self, texts: list[str], add_special: bool = True, parse_special: bool = True) -> list[list[int]]:
        return self._ask("tokenize", texts, add_special, parse_special)

    def detokenize(self, ids: list[int], remove_special: bool = False, unparse_special: bool = True) -> bytes:
        return self.detokenize_all([ids], remove_special, unparse_special)[0]

    def detokenize_all(
        self, lists: list[list[int]], remove_special: bool = False, unparse_special: bool = True
    ) -> list[bytes]:
        found = self._ask("detokenize", lists, remove_special, unparse_special)
        return [base64.b64decode(x) for x in found]

    def piece(self, token: int, special: bool = True) -> bytes:
        return base64.b64decode(self._ask("pieces", [token], special)[0])

    def pieces(self, special: bool = True) -> list[bytes]:
        """The bytes of every token."""
        return [base64.b64decode(x) for x in self._ask("pieces", list(range(self.vocab_size)), special)]

    def special(self) -> dict:
        """bos, eos, sep, pad (-1: none), add_bos, add_eos, add_sep, and the ids that end a generation."""
        return self._ask("special")

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits at every position, float32 [T, vocab]: F32 cache, flash attention off."""
        shape, data = self._ask("logits", list(ids))
        return np.frombuffer(base64.b64decode(data), np.float32).reshape(shape)

    def embeddings(self, ids: list[int], pooling: str) -> np.ndarray:
        """Hidden states as llama.cpp pools them, not normalised: [d_model], or [T, d_model] for pooling "none"."""
        shape, data = self._ask("embeddings", list(ids), ["none", "mean", "cls", "last"].index(pooling))
        return np.frombuffer(base64.b64decode(data), np.float32).reshape(shape)

    def scores(self, ids: list[int]) -> np.ndarray:
        """What the head that ranks makes of a pair, float32 [labels]."""
        shape, data = self._ask("scores", list(ids))
        return np.frombuffer(base64.b64decode(data), np.float32).reshape(shape)


def _start() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
    )  # fmt: skip


def _end(worker: subprocess.Popen) -> None:
    worker.kill()
    worker.wait()
    worker.stdout.close()
    with contextlib.suppress(BrokenPipeError):
        worker.stdin.close()


@atexit.register
def _end_idle() -> None:
    while LlamaCpp._idle:
        _end(LlamaCpp._idle.pop())


class _Worker:
    def __init__(self):
        import llama_cpp

        self.lib, self.model = llama_cpp, None
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, None)

    def open(self, path: str, vocab_only: bool) -> int:
        lib = self.lib
        if self.model:
            lib.llama_model_free(self.model)
        params = lib.llama_model_default_params()
        params.n_gpu_layers, params.vocab_only = 0, vocab_only
        self.model = lib.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise RuntimeError(f"cannot load {path}")
        self.vocab = lib.llama_model_get_vocab(self.model)
        return self.vocab_size()

    def vocab_size(self) -> int:
        return self.lib.llama_vocab_n_tokens(self.vocab)

    def tokenize(self, texts: list[str], add_special: bool, parse_special: bool) -> list[list[int]]:
        out = []
        for text in texts:
            data = text.encode()
            size = len(data) + 16
            while True:
                buffer = (self.lib.llama_token * size)()
                n = self.lib.llama_tokenize(self.vocab, data, len(data), buffer, size, add_special, parse_special)
                if n >= 0:
                    break
                size = -n
            out.append(list(buffer[:n]))
        return out

    def detokenize(self, lists: list[list[int]], remove_special: bool, unparse_special: bool) -> list[str]:
        import ctypes

        out = []
        for ids in lists:
            array, size = (self.lib.llama_token * len(ids))(*ids), 64 * len(ids) + 64
            while True:
                buffer = ctypes.create_string_buffer(size)
                n = self.lib.llama_detokenize(
                    self.vocab, array, len(ids), buffer, size, remove_special, unparse_special
                )
                if n >= 0:
                    break
                size = -n
            out.append(base64.b64encode(buffer.raw[:n]).decode())
        return out

    def pieces(self, ids: list[int], special: bool) -> list[str]:
        import ctypes

        out, buffer = [], ctypes.create_string_buffer(4096)
        for token in ids:
            n = self.lib.llama_token_to_piece(self.vocab, token, buffer, 4096, 0, special)
            out.append(base64.b64encode(buffer.raw[:n]).decode())
        return out

    def special(self) -> dict:
        lib, v = self.lib, self.vocab
        found = {name: getattr(lib, f"llama_vocab_{name}")(v) for name in ("bos", "eos", "sep", "pad")}
        flags = {name: bool(getattr(lib, f"llama_vocab_get_{name}")(v)) for name in ("add_bos", "add_eos", "add_sep")}
        return {**found, **flags, "eog": [i for i in range(self.vocab_size()) if lib.llama_vocab_is_eog(v, i)]}

    def logits(self, ids: list[int]) -> tuple[list[int], str]:
        lib, n = self.lib, len(ids)
        context = self._run(ids)
        rows = [np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), (self.vocab_size(),)) for i in range(n)]
        return self._answer(context, np.stack(rows))

    def embeddings(self, ids: list[int], pooling: int) -> tuple[list[int], str]:
        lib, n = self.lib, len(ids)
        context, width = self._run(ids, embeddings=True, pooling_type=pooling), (lib.llama_model_n_embd(self.model),)
        if pooling:
            return self._answer(context, np.ctypeslib.as_array(lib.llama_get_embeddings_seq(context, 0), width))
        rows = [np.ctypeslib.as_array(lib.llama_get_embeddings_ith(context, i), width) for i in range(n)]
        return self._answer(context, np.stack(rows))

    def scores(self, ids: list[int]) -> tuple[list[int], str]:
        context = self._run(ids, embeddings=True, pooling_type=4)
        shape = (self.lib.llama_model_n_cls_out(self.model),)
        return self._answer(context, np.ctypeslib.as_array(self.lib.llama_get_embeddings_seq(context, 0), shape))

    def _run(self, ids: list[int], **options: object):
        """A context after one batch of these tokens."""
        lib, n = self.lib, len(ids)
        params = lib.llama_context_default_params()
        # Attention takes memory for all pairs of a ubatch's rows and the context; pooling needs all rows in one.
        params.n_ctx, params.n_batch = max(n, 32), max(n, 32)
        params.n_ubatch = max(n, 32) if options else min(max(n, 32), 512)
        params.n_threads = params.n_threads_batch = 2
        params.type_k = params.type_v = params.flash_attn_type = 0
        params.swa_full = True
        for name, value in options.items():
            setattr(params, name, value)
        context = lib.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError("cannot make a context")
        batch = lib.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        run = lib.llama_encode if lib.llama_model_has_encoder(self.model) else lib.llama_decode
        status = run(context, batch)
        lib.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"the batch returned {status}")
        return context

    def _answer(self, context, rows: np.ndarray) -> tuple[list[int], str]:
        out = rows.astype(np.float32)
        self.lib.llama_free(context)
        return list(out.shape), base64.b64encode(out.tobytes()).decode()


def _serve() -> None:
    # What llama.cpp prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = _Worker()
    for line in sys.stdin:
        method, *args = json.loads(line)
        try:
            answer = {"ok": getattr(worker, method)(*args)}
        except RuntimeError as error:
            answer = {"error": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
    # The package's own clean-up at exit can crash.
    os._exit(0)
