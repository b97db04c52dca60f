"""`oxjax.sample` in a loop of one's own over `oxjax.step`, against `LLM.generate`, to the bit."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oxjax
from oxjax import LLM, Grammar, SamplingParams
from oxjax.assets import embedded_model
from oxjax.errors import GrammarError, InvalidRequestError, NonFiniteLogitsError, NothingLeftError
from tests.helpers.law_harness import PARAMS

PROMPT = "Once upon a time, there was a little"
DRAWN = SamplingParams(max_tokens=24, temperature=0.9, seed=2**63 + 5, logprobs=3)
CASES = {
    "greedy": dataclasses.replace(DRAWN, temperature=0.0),
    "plain": DRAWN,
    "every stage": dataclasses.replace(PARAMS, max_tokens=24, stop_token_ids=()),
    "of the distribution": dataclasses.replace(DRAWN, top_p=0.9, logprobs_of="sampling"),
    "mirostat": dataclasses.replace(DRAWN, mirostat=1, mirostat_tau=3.0),
    "dry": dataclasses.replace(DRAWN, dry_multiplier=0.8, dry_allowed_length=1),
    "min_tokens": dataclasses.replace(DRAWN, min_tokens=10),
    "grammar": dataclasses.replace(DRAWN, grammar=Grammar.regex("( [a-z]{2,7}){8}\\.")),
}


@pytest.fixture(scope="module")
def model():
    return oxjax.load(embedded_model())


@pytest.fixture(scope="module")
def llm():
    with LLM(max_context=128) as llm:
        yield llm


def loop(model, params, n):
    """`n` samples after the prompt, each a step of one row."""
    tokens = model.tokenizer.encode(PROMPT)
    n_prompt, config = len(tokens), model.config
    step = jax.jit(partial(oxjax.step, config=config), donate_argnums=1)
    state = oxjax.init_state(config, n_pages=9, page_size=16)
    mu, found = None, []
    for i in range(n_prompt + n - 1):
        batch = oxjax.Batch(
            tokens=jnp.array(tokens[i : i + 1], jnp.int32),
            positions=jnp.array([i], jnp.int32),
            cu_q_lens=jnp.array([0, 1], jnp.int32),
            kv_lens=jnp.array([i + 1], jnp.int32),
            block_tables=jnp.arange(1, 9, dtype=jnp.int32)[None],
            read_slots=jnp.zeros(1, jnp.int32),
            write_slots=jnp.zeros(1, jnp.int32),
            logits_rows=jnp.zeros(1, jnp.int32),
        )
        logits, state = step(model.params, state, batch)
        if i + 1 < n_prompt:
            continue
        sampled = oxjax.sample(
            logits[0],
            params,
            tokens=tokens,
            n_prompt=n_prompt,
            seed=params.seed,
            mu=mu,
            tokenizer=model.tokenizer,
            numerics=config.numerics,
        )
        mu = sampled.mu
        tokens.append(sampled.token_id)
        found.append(sampled)
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_loop_over_step_has_the_bits_of_generate(model, llm, name):
    (expected,) = llm.generate(PROMPT, CASES[name])
    found = loop(model, CASES[name], len(expected.token_ids))
    assert [s.token_id for s in found] == expected.token_ids
    assert [s.logprob for s in found] == expected.logprobs
    assert [s.top_logprobs for s in found] == [tuple(map(tuple, top)) for top in expected.top_logprobs]


LOGITS = np.linspace(-1, 1, 50, dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"n_prompt": 0}, InvalidRequestError, "n_prompt 0"),
        ({"n_prompt": 4}, InvalidRequestError, "3 tokens, n_prompt 4"),
        ({"logits": LOGITS[None]}, InvalidRequestError, r"shape \(1, 50\)"),
        ({"seed": -1}, InvalidRequestError, "seed -1"),
        ({"params": SamplingParams(n=2)}, InvalidRequestError, "expected n 1"),
        ({"params": SamplingParams(dry_multiplier=1.0)}, InvalidRequestError, "DRY: expected a tokenizer"),
        ({"params": SamplingParams(banned_tokens=[50])}, InvalidRequestError, "token id 50 is outside"),
        ({"params": SamplingParams(banned_tokens=list(range(50)))}, InvalidRequestError, "all 50 tokens"),
        ({"logits": np.full(50, np.nan, np.float32)}, NonFiniteLogitsError, "position 3"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_bad_arguments_are_named(changes, error, message):
    call = {"logits": LOGITS, "params": SamplingParams(), "tokens": [1, 2, 3], "n_prompt": 2} | changes
    with pytest.raises(error, match=message):
        oxjax.sample(call.pop("logits"), call.pop("params"), **call)


def test_what_a_grammar_does_not_allow_is_refused(model):
    tokens = model.tokenizer.encode("Once upon a time")
    params, logits = SamplingParams(grammar=Grammar.choice(["x"])), jnp.zeros(model.config.vocab_size)
    call = partial(oxjax.sample, logits, params, tokenizer=model.tokenizer)
    with pytest.raises(GrammarError):
        call(tokens=tokens, n_prompt=1)
    allowed = call(tokens=tokens, n_prompt=len(tokens))
    assert model.tokenizer.decode([allowed.token_id]) == "x"
    banned = [i for i in range(model.config.vocab_size) if model.tokenizer.token_bytes(i) == b"x"]
    with pytest.raises(NothingLeftError):
        call = partial(call.func, logits, dataclasses.replace(params, banned_tokens=banned), **call.keywords)
        call(tokens=tokens, n_prompt=len(tokens))
