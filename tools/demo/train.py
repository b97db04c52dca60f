"""Tokenizer, token streams, the optimiser loop and the held-out loss of the demo models."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from . import model

END = "<|endoftext|>"  # stands before, between and after stories: it is BOS and EOS at once


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's splitting rule; `END` is id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each story between two END tokens."""
    end = tokenizer.token_to_id(END)
    return [np.array([end, *e.ids, end], np.int32) for e in tokenizer.encode_batch(texts)]


def stream(stories: list[np.ndarray]) -> np.ndarray:
    """One long run of ids: neighbouring stories share the END token between them."""
    return np.concatenate([stories[0][:1], *(ids[1:] for ids in stories)])


def fit(
    shape: model.Shape, ids: np.ndarray, steps: int, seed: int, log: Callable[[str], None]
) -> tuple[model.Params, float]:
    """Train from scratch on windows of `ids`; the last eighth of the steps see the full context.

    A window begins where a story begins, so the names that a sentence needs have always been introduced.

    Args:
        shape: sizes of the model.
        ids: the token stream.
        steps: optimiser steps of 2048 tokens each.
        seed: fixes the initial weights and the order of the windows.
        log: receives a line now and then.

    Returns:
        (parameters, wall time in seconds).
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, max(1, min(100, steps // 4)), steps, 3e-5)
    decayed = lambda params: {name: leaf.ndim > 1 for name, leaf in params.items()}  # noqa: E731
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1, mask=decayed)
    )
    params = model.init(shape, seed)
    state = optimiser.init(params)

    @jax.jit
    def step(params, state, tokens):
        loss, grads = jax.value_and_grad(lambda p: model.losses(p, tokens, shape).mean())(params)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    rng, starts = np.random.default_rng(seed), np.flatnonzero(ids == ids[0])
    start, recent = time.perf_counter(), []
    for n in range(steps):
        length = shape.context if n >= steps - steps // 8 else shape.context // 2
        at = rng.choice(starts[starts < len(ids) - length], 2048 // length)
        params, state, loss = step(params, state, jnp.asarray(ids[at[:, None] + np.arange(length + 1)]))
        recent.append(loss)
        if (n + 1) % 100 == 0 or n + 1 == steps:
            seconds = time.perf_counter() - start
            log(f"step {n + 1}/{steps}  loss {np.mean(jax.device_get(recent)):.4f}  {seconds:.0f} s")
            recent = []
    return params, time.perf_counter() - start


def held_out_loss(params: model.Params, shape: model.Shape, stories: list[np.ndarray]) -> float:
    """Mean nats per token (every token of a story and the END after it), each story read on its own."""
    width = max(len(ids) for ids in stories)
    padded = np.zeros((-(-len(stories) // 16) * 16, width), np.int32)
    real = np.zeros((len(padded), width - 1), bool)
    for row, ids in enumerate(stories):
        padded[row, : len(ids)] = ids
        real[row, : len(ids) - 1] = True
    loss = jax.jit(lambda tokens: model.losses(params, tokens, shape))
    rows = [np.asarray(loss(padded[i : i + 16])) for i in range(0, len(padded), 16)]
    return float(np.concatenate(rows)[real].mean(dtype=np.float64))


def sample(
    params: model.Params, shape: model.Shape, prompt: list[int], end: int, temperature: float, seed: int
) -> list[int]:
    """Continue `prompt` until END or 320 tokens, recomputing everything each step: slow, short and plain."""
    width, ids, key = 320, list(prompt), jax.random.key(seed)

    @jax.jit
    def draw(tokens, last, key):
        row = model.logits(params, tokens[None], shape)[0, last]
        return jax.random.categorical(key, row / temperature)

    while len(ids) < width:
        padded = np.zeros(width, np.int32)
        padded[: len(ids)] = ids
        token = int(draw(padded, len(ids) - 1, jax.random.fold_in(key, len(ids))))
        if token == end:
            break
        ids.append(token)
    return ids
