"""Bodies of OpenAI's API from results, with token ids and seed added, which make them reproducible."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from oxjax.chat.parser import Message
from oxjax.results import Result, Score
from oxjax.tokenizer import Tokenizer

_REASONS = {"context": "length"}  # OpenAI has no other word for it


def completion(results: Sequence[Result], n_prompt: int, tokenizer: Tokenizer, *, reports: bool) -> dict[str, Any]:
    """Body of a completions response; the prompts have `n_prompt` tokens in all."""
    choices = []
    for i, result in enumerate(results):
        choice = {"index": i, "text": result.text, "finish_reason": _reason(result), **_facts(result)}
        choice["logprobs"] = _legacy(result, tokenizer) if reports else None
        if result.prompt_logprobs is not None:
            choice["prompt_logprobs"] = [s if s is None else asdict(s) for s in result.prompt_logprobs]
        choices.append(choice)
    return {"object": "text_completion", "choices": choices, "usage": _usage(n_prompt, results)}


def chat_completion(
    results: Sequence[Result], messages: Sequence[Message], tokenizer: Tokenizer, *, reports: bool
) -> dict[str, Any]:
    """Body of a chat completion."""
    choices = []
    for i, (result, message) in enumerate(zip(results, messages, strict=True)):
        said: dict[str, Any] = {"role": "assistant", "content": message.content}
        if message.reasoning:
            said["reasoning_content"] = message.reasoning
        if message.tool_calls:
            said["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": json.dumps(c.arguments)}}
                for c in message.tool_calls
            ]
        reason = "tool_calls" if message.tool_calls else _reason(result)
        choice = {"index": i, "message": said, "finish_reason": reason, **_facts(result)}
        choice["logprobs"] = {"content": _content(result, tokenizer)} if reports else None
        choices.append(choice)
    return {"object": "chat.completion", "choices": choices, "usage": _usage(len(results[0].prompt_token_ids), results)}


def embeddings(vectors: Iterable[np.ndarray], n_tokens: int, encoding: str) -> dict[str, Any]:
    """Body of an embeddings response; base64 encodes little-endian float32."""
    data = []
    for i, vector in enumerate(vectors):
        value = base64.b64encode(vector.astype("<f4").tobytes()).decode() if encoding == "base64" else vector.tolist()
        data.append({"object": "embedding", "index": i, "embedding": value})
    return {"object": "list", "data": data, "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens}}


def ranking(found: Sequence[np.floating], n_tokens: int, top_n: int | None) -> dict[str, Any]:
    """Body of a reranking: documents sorted by score, best first; equal scores keep the order of the request."""
    order = sorted(range(len(found)), key=lambda i: -found[i])[:top_n]
    results = [{"index": i, "relevance_score": float(found[i])} for i in order]
    return {"object": "list", "results": results, "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens}}


def scores(found: Sequence[Score], n_context: int) -> dict[str, Any]:
    """Body of a scoring response."""
    total = n_context + sum(len(score.token_ids) for score in found)
    return {
        "object": "score",
        "scores": [asdict(score) for score in found],
        "usage": {"prompt_tokens": total, "total_tokens": total},
    }


def _reason(result: Result) -> str:
    return _REASONS.get(result.finish_reason, result.finish_reason)


def _facts(result: Result) -> dict[str, Any]:
    return {"token_ids": result.token_ids, "seed": result.seed}


def _usage(n_prompt: int, results: Sequence[Result]) -> dict[str, int]:
    made = sum(len(r.token_ids) for r in results)
    return {"prompt_tokens": n_prompt, "completion_tokens": made, "total_tokens": n_prompt + made}


def _piece(token: int, tokenizer: Tokenizer) -> str:
    return tokenizer.token_bytes(token).decode("utf-8", "replace")


def _legacy(result: Result, tokenizer: Tokenizer) -> dict[str, Any]:
    top = None
    if result.top_logprobs is not None:
        top = [{_piece(t, tokenizer): x for t, x in reversed(pairs)} for pairs in result.top_logprobs]
    tokens = [_piece(t, tokenizer) for t in result.token_ids]
    return {"tokens": tokens, "token_logprobs": result.logprobs, "top_logprobs": top}


def _content(result: Result, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}

    tops = result.top_logprobs or [()] * len(result.token_ids)
    return [
        {**entry(token, logprob), "top_logprobs": [entry(*pair) for pair in pairs]}
        for token, logprob, pairs in zip(result.token_ids, result.logprobs, tops, strict=True)
    ]
