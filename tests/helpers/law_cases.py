"""Models and requests that the tests of the law have in common."""

import dataclasses

import pytest

from tests.helpers.law_harness import EMBEDDED, PARAMS, RANDOM, STORIES, TOYS, prompts

QUICK = [EMBEDDED, STORIES, "toy hybrid"]
KINDS = ["archs/gemma3", "archs/deepseek2_mla", "archs/mamba2", "archs/qwen35"]  # windows, latents, Mamba-2, delta net
# One of each kind of state that the quick models have not, with as few layers as it takes.
SMALLEST = [RANDOM + n for n in ("latents", "mamba2: one layer", "qwen35: two layers")]
# The last of these keeps slots and pages of latents.
OTHERS = ["toy recurrent", RANDOM + "rwkv7: one layer", RANDOM + "kimi-linear"]
OTHERS += [
    f"archs/{n}" for n in ("llama_yarn", "qwen3", "gemma2", "phi3", "cohere2", "falcon", "gpt2", "granite", "olmo2")
]
OTHERS += [
    f"archs/{n}" for n in ("mamba", "jamba", "falconh1", "granitehybrid", "qwen3next", "mixtral", "gptoss", "qwen2moe")
]


def held_for(*names):
    """By default for these models, in the slow run for all of them."""
    slow = [pytest.param(n, marks=pytest.mark.slow) for n in QUICK + KINDS + OTHERS if n not in names]
    return pytest.mark.parametrize("harness", [*names, *slow], indirect=True)


for_all = held_for(EMBEDDED, "toy hybrid")
for_windows_too = held_for(RANDOM + "windows", "toy hybrid")
for_recurrent = pytest.mark.parametrize("harness", TOYS, indirect=True)
IDS = prompts(1, 90)[0]
LONG = dataclasses.replace(PARAMS, max_tokens=60, min_tokens=60)
FREE = dataclasses.replace(LONG, mirostat=0, mirostat_tau=5.0)  # what was generated is as good as a prompt
