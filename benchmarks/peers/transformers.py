"""transformers on torch: random weights of a file's shape in bfloat16, which is good for speed alone."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Qwen3Config

from oxjax.gguf import GGUFFile

_CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config}


def _config(path: str) -> Any:
    with GGUFFile.open(path) as file:
        arch = file.get("general.architecture", str)
        if arch not in _CONFIGS:
            raise RuntimeError(f"{path}: no transformers model for {arch!r}, only for {', '.join(_CONFIGS)}")

        def number(key: str, default: int | None = None) -> int:
            return file.get(f"{arch}.{key}", int, default)

        heads, d_model = number("attention.head_count"), number("embedding_length")
        return _CONFIGS[arch](
            vocab_size=file.tensors["token_embd.weight"].shape[0],
            hidden_size=d_model,
            intermediate_size=number("feed_forward_length"),
            num_hidden_layers=number("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=number("attention.head_count_kv", heads),
            head_dim=number("attention.key_length", d_model // heads),
            max_position_embeddings=number("context_length"),
            tie_word_embeddings="output.weight" not in file.tensors,
        )


class Engine:
    """A model with random weights.

    Args:
        model: a GGUF file that says what shape it has.
        threads: of torch.
    """

    def __init__(self, model: str, threads: int):
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        config = _config(model)
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    def first_token(self, prompts: list[list[int]], _: dict[str, Any]) -> None:
        self._prompt(prompts[0])

    def prefill(self, prompts: list[list[int]], _: int, __: dict[str, Any]) -> tuple[float, int]:
        """Seconds until the token after a prompt, and the prompt's tokens."""
        (prompt,) = prompts
        start = time.perf_counter()
        self._prompt(prompt)
        return time.perf_counter() - start, len(prompt)

    def decode(self, prompts: list[list[int]], n_new: int, _: dict[str, Any]) -> tuple[float, int]:
        """Seconds for tokens after prompts, and how many they are, in all sequences together.

        Every sequence has a copy of the first prompt's keys and values, which takes less time than computing them.
        """
        n = len(prompts)
        cache, _token = self._prompt(prompts[0])
        cache.batch_repeat_interleave(n)
        last = self._step(torch.tensor([prompt[:1] for prompt in prompts]), cache)
        start = time.perf_counter()
        for _i in range(n_new):
            last = self._step(last, cache)
        return time.perf_counter() - start, n * n_new

    def score(self, prompts: list[list[int]], _: int, __: dict[str, Any]) -> tuple[float, int]:
        """Seconds for the log-probabilities of a text's tokens, and how many tokens it has."""
        (text,) = prompts
        start = time.perf_counter()
        ids = torch.tensor([text])
        logits = self.model(ids, use_cache=False).logits[0, :-1].float()
        (torch.gather(logits, 1, ids[0, 1:, None])[:, 0] - torch.logsumexp(logits, 1)).tolist()
        return time.perf_counter() - start, len(text)

    def _prompt(self, tokens: list[int]) -> tuple[DynamicCache, int]:
        cache = DynamicCache(config=self.model.config)
        out = self.model(torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache, int(out.logits[0, -1].argmax())

    def _step(self, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        logits = self.model(tokens, past_key_values=cache, use_cache=True).logits
        last = logits[:, -1].argmax(-1, keepdim=True)
        last.tolist()  # as others do: somebody reads the tokens
        return last
