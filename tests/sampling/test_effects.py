"""Every field of the parameters has an effect on what a request gives, or is refused where it has none."""

import dataclasses

import pytest

from oxjax import LLM, Grammar, SamplingParams
from oxjax.errors import InvalidRequestError

BASE = SamplingParams(max_tokens=24, temperature=1.2, seed=5)
# What each field is set to, and what it needs beside it. Many tokens recur in a story of few words.
CHANGES = {
    "max_tokens": (7, {}),
    "temperature": (0.4, {}),
    "top_k": (2, {}),
    "top_p": (0.3, {}),
    "min_p": (0.5, {}),
    "seed": (6, {}),
    "logprobs": (3, {}),
    "stop": ((" ",), {}),
    "ignore_eos": (True, {"logit_bias": {0: 100.0}}),
    "n": (2, {}),
    "best_of": (4, {}),
    "min_tokens": (20, {"stop": (" ",)}),
    "logit_bias": ({300: 50.0}, {}),
    "banned_tokens": (tuple(range(100, 400)), {}),
    "stop_token_ids": (tuple(range(5, 600)), {}),
    "repetition_penalty": (2.0, {}),
    "frequency_penalty": (3.0, {}),
    "presence_penalty": (20.0, {}),
    "penalty_window": (1, {"presence_penalty": 5.0}),
    "temperature_range": (1.1, {}),
    "temperature_exponent": (8.0, {"temperature_range": 1.1}),
    "typical_p": (0.2, {}),
    "top_a": (0.9, {}),
    "epsilon_cutoff": (0.3, {}),
    "eta_cutoff": (0.9, {}),
    "top_n_sigma": (0.5, {}),
    "xtc_probability": (1.0, {}),
    "xtc_threshold": (0.4, {"xtc_probability": 1.0}),
    "mirostat": (2, {"temperature": 3.0}),
    "mirostat_tau": (0.2, {"mirostat": 2}),
    "mirostat_eta": (1.0, {"mirostat": 2, "mirostat_tau": 1.0}),
    "logprobs_of": ("sampling", {"logprobs": 2}),
    "prompt_logprobs": (2, {}),
    "dry_multiplier": (20.0, {"logit_bias": {300: 60.0, 310: 60.0}}),
    "dry_base": (5.0, {"logit_bias": {300: 60.0, 310: 60.0}, "dry_multiplier": 0.5}),
    "dry_allowed_length": (6, {"logit_bias": {300: 60.0, 310: 60.0}, "dry_multiplier": 20.0}),
    "dry_window": (3, {"logit_bias": {300: 60.0, 310: 60.0}, "dry_multiplier": 20.0}),
    "dry_breakers": ((), {"logit_bias": {12: 12.0, 14: 12.0}, "dry_multiplier": 20.0, "dry_breakers": (",", ".")}),
    "grammar": (Grammar.regex("[a-c]{5}"), {}),
    "order": (("top_p", "temperature"), {"top_p": 0.9, "temperature": 3.0}),
}


@pytest.fixture(scope="module")
def llm():
    with LLM(max_context=128) as llm:
        yield llm


def test_all_fields_are_here():
    assert set(CHANGES) == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize("name", CHANGES)
def test_a_field_changes_what_comes(llm, name):
    value, beside = CHANGES[name]
    with_it, without = (
        llm.generate("Once upon a time, there was a cat", dataclasses.replace(BASE, **{**beside, **change}))[0]
        for change in ({name: value}, {})
    )
    assert with_it != without


@pytest.mark.parametrize(
    "refused",
    [
        {"temperature": 0.0, "typical_p": 0.5},
        {"temperature": 0.0, "xtc_probability": 0.5},
        {"temperature": 0.0, "mirostat": 1},
        {"temperature": 0.0, "temperature_range": 0.5},
        {"temperature_exponent": 2.0},
        {"xtc_threshold": 0.2},
        {"mirostat_tau": 3.0},
        {"mirostat_eta": 0.3},
        {"dry_base": 2.0},
        {"dry_breakers": ("x",)},
        {"dry_allowed_length": 3},
        {"dry_window": 10},
        {"penalty_window": 10},
        {"grammar": Grammar.regex("a"), "ignore_eos": True},
        {"best_of": 1, "n": 2},
        {"logprobs_of": "nobody"},
    ],
    ids=str,
)
def test_what_has_no_effect_is_refused(refused):
    with pytest.raises(InvalidRequestError):
        SamplingParams(**refused)
