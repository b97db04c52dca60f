"""`oxjax.sample`: the engine's sampling of one token, as a function, for loops of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from oxjax.constrain.matcher import GrammarCompiler
from oxjax.errors import InvalidRequestError
from oxjax.kernels.native import resolve_backend
from oxjax.kernels.numerics import Numerics
from oxjax.sampling.dry import Dry
from oxjax.sampling.edits import edits_of
from oxjax.sampling.packing import (
    SamplingInputs,
    SamplingMetadata,
    bucket_for,
    pack_rows,
    sample_packed,
    top_buckets,
)
from oxjax.sampling.params import SamplingParams
from oxjax.sampling.sampled import sampled_tokens, to_host
from oxjax.tokenizer import Tokenizer


class Sample(NamedTuple):
    """A sampled token.

    Attributes:
        token_id: its id.
        logprob: its log-probability, of the distribution that `params.logprobs_of` names.
        rank: its place in that distribution, from 1; None unless log-probabilities were asked for.
        top_logprobs: (id, log-probability) of the token, then of the `params.logprobs` most likely others; empty unless
            asked for.
        mu: mirostat's state for the next token, in bits; None without mirostat.
    """

    token_id: int
    logprob: float
    rank: int | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    mu: float | None = None


def sample(
    logits: jax.Array | np.ndarray,
    params: SamplingParams,
    *,
    tokens: Sequence[int],
    n_prompt: int,
    seed: int = 0,
    mu: float | None = None,
    tokenizer: Tokenizer | None = None,
    numerics: Numerics | None = None,
) -> Sample:
    """Sample the token after a text from the model's logits, with the bits of `LLM.generate`. Pure.

    Args:
        logits: `[vocab]`, for the next position.
        params: sampling parameters; limits, stops and `n` are the caller's business.
        tokens: ids of prompt and output so far. Penalties, DRY, grammars, `min_tokens` and the draw depend on them.
        n_prompt: number of tokens of the prompt among them.
        seed: of the request, 64 bits; `params.seed` is not looked at.
        mu: mirostat's state, `Sample.mu` of the token before; None at the first one.
        tokenizer: of the model; for grammars, DRY and `min_tokens`.
        numerics: those of the model's config; None is exact, on the backend of this machine.

    Raises:
        InvalidRequestError: arguments do not fit together, or forbid every token.
        GrammarError, GrammarStuckError: the output is not in the grammar's language, or nothing may follow.
        NonFiniteLogitsError, NothingLeftError: there is no distribution to sample from.
    """
    if logits.ndim != 1 or not 0 < n_prompt <= len(tokens):
        raise InvalidRequestError(
            f"logits of shape {logits.shape}, {len(tokens)} tokens, n_prompt {n_prompt}: expected logits of one "
            "position and the prompt among the tokens"
        )
    if not 0 <= seed < 2**64:
        raise InvalidRequestError(f"seed {seed}: expected 64 bits")
    if params.n_samples != 1 or params.prompt_logprobs is not None:
        raise InvalidRequestError("a token is sampled: expected n 1, and neither best_of nor prompt_logprobs")
    vocab_size, known = logits.shape[0], [int(token) for token in tokens]
    inputs = _inputs(params, known, n_prompt, mu, tokenizer, vocab_size)
    eog_ids = tokenizer.eog_ids if tokenizer is not None else ()
    metadata = SamplingMetadata(params, seed, edits_of(params, eog_ids, n_prompt, vocab_size))
    bucket = bucket_for([(metadata, inputs)])
    packed = pack_rows(1, [(0, metadata, inputs)], bucket)
    mask = np.zeros(-(-vocab_size // 32), np.uint32) if inputs.mask is None else inputs.mask
    n_top = top_buckets(params.logprobs, vocab_size)[-1]
    if numerics is None:
        numerics = Numerics(backend=resolve_backend("auto"))
    rows = jnp.asarray(logits, jnp.float32)[None]
    sampled = sample_packed(rows, packed, mask[None], n_top=n_top, bucket=bucket, numerics=numerics)
    (found,) = sampled_tokens(to_host(sampled))
    if (error := found.error(len(known))) is not None:
        raise error
    rank, mu = found.rank if params.logprobs else None, found.mu if params.mirostat else None
    return Sample(found.token, found.logprob, rank, found.pairs(params.logprobs), mu)


def _inputs(
    params: SamplingParams,
    tokens: list[int],
    n_prompt: int,
    mu: float | None,
    tokenizer: Tokenizer | None,
    vocab_size: int,
) -> SamplingInputs:
    needs = {
        "a grammar": params.grammar is not None,
        "DRY": params.dry_multiplier != 0.0,
        "min_tokens": params.min_tokens > 0 and not params.ignore_eos,
    }
    if tokenizer is None:
        if any(needs.values()):
            raise InvalidRequestError(f"{', '.join(n for n, asked in needs.items() if asked)}: expected a tokenizer")
        return SamplingInputs(tokens, params.initial_mu if mu is None else mu)
    penalties: list[tuple[int, float]] = []
    if params.dry_multiplier:
        dry = Dry(params, tokenizer.token_bytes)
        for token in tokens:
            dry.push(token)
        penalties = dry.penalties(tokens)
    mask = None
    if params.grammar is not None:
        mask = _compiler(tokenizer, vocab_size).start(params.grammar, tokens[n_prompt:]).mask()
    return SamplingInputs(tokens, params.initial_mu if mu is None else mu, penalties, mask)


@lru_cache(maxsize=4)
def _compiler(tokenizer: Tokenizer, vocab_size: int) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, vocab_size)
