"""What sampling costs: stages of the pipeline on the device, masks of grammars and DRY on the host.

python -m benchmarks.sampling [--model FILE] [--tokenizer FILE] [--vocabularies 32000,128000,256000] [--rows 1,32,256]

Microseconds a row for one choice of a token, by vocabulary and rows; settings take turns, medians of the rounds. Logits
are peaked (normal ones with a steep head) or flat. With a model: its own logits, and the time beside that of its greedy
decode step. A grammar's masks are timed along a text in its language, with the vocabulary of the tokenizer (or the
embedded model's), DRY after texts of some thousand tokens. A busy machine gives numbers that say little.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oxjax import LLM, Grammar, SamplingParams
from oxjax.assets import embedded_model
from oxjax.constrain.matcher import GrammarCompiler
from oxjax.kernels.native import resolve_backend
from oxjax.kernels.numerics import Numerics
from oxjax.sampling.dry import Dry
from oxjax.sampling.edits import edits_of
from oxjax.sampling.packing import MIN_TOP, SamplingInputs, SamplingMetadata, bucket_for, pack_rows, sample_packed
from oxjax.tokenizer import Tokenizer

MASK = "grammar mask"
CHAIN = {"temperature": 0.8, "top_k": 40, "top_p": 0.95}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain draw": {},
    "temperature": {"temperature": 0.8},
    "dynamic temperature": {"temperature": 0.8, "temperature_range": 0.3},
    "top_k": {"top_k": 40},
    "top_p": {"top_p": 0.95},
    "min_p": {"min_p": 0.05},
    "typical_p": {"typical_p": 0.9},
    "top_a": {"top_a": 0.2},
    "epsilon_cutoff": {"epsilon_cutoff": 3e-4},
    "eta_cutoff": {"eta_cutoff": 3e-4},
    "top_n_sigma": {"top_n_sigma": 1.0},
    "xtc": {"xtc_probability": 1.0},
    "mirostat 1": {"mirostat": 1},
    "mirostat 2": {"mirostat": 2},
    "penalties": {"repetition_penalty": 1.1},
    "logit bias": {"logit_bias": dict.fromkeys(range(16), 1.0)},
    MASK: {},
    "log-probabilities, model": {"logprobs": 5},
    "log-probabilities, sampling": {"logprobs": 5, "logprobs_of": "sampling"},
    "temperature 0.8, top_k 40, top_p 0.95": CHAIN,
}
MODEL_ROWS, MODEL_STEPS = 16, 24

JSON = r"""
root   ::= object
value  ::= object | array | string | number | "true" | "false" | "null"
object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? "}" ws
array  ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt/] | "u" [0-9a-fA-F]{4}))* "\"" ws
number ::= "-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""
PERSON = {"name": "Ada Lovelace", "born": 1815, "tags": ["analyst", "poet"], "home": {"town": "London", "km": 12.5}}
_TEXT, _NUMBER = {"type": "string"}, {"type": "number"}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": _TEXT,
        "born": {"type": "integer"},
        "tags": {"type": "array", "items": _TEXT},
        "home": {"type": "object", "properties": {"town": _TEXT, "km": _NUMBER}, "required": ["town", "km"]},
    },
    "required": ["name", "born", "tags", "home"],
}


def peaked(n_rows: int, vocab: int) -> np.ndarray:
    """Logits as models have them: a head of a hundred tokens that falls as Zipf's law does, above normal ones."""
    rng = np.random.default_rng(0)
    rows = 3 * rng.standard_normal((n_rows, vocab), np.float32)
    head = 20 - 1.5 * np.log(np.arange(1, 101, dtype=np.float32))
    for row in rows:
        row[rng.choice(vocab, len(head), replace=False)] = head
    return rows


def flat(n_rows: int, vocab: int) -> np.ndarray:
    return 0.01 * np.random.default_rng(0).standard_normal((n_rows, vocab), np.float32)


def chooser(logits: jax.Array, name: str) -> Callable[[], object]:
    """A function that chooses a token for every row, as the engine's steps do, and waits for them."""
    n_rows, vocab = logits.shape
    params, mask = SamplingParams(seed=1, **SETTINGS[name]), None
    masks = np.zeros((n_rows, -(-vocab // 32)), np.uint32)
    if name == MASK:
        masks[:] = np.random.default_rng(1).integers(0, 2**32, masks.shape, np.uint32)
        mask = masks[0]
    inputs = SamplingInputs(list(range(64)), params.initial_mu, mask=mask)
    rows = [SamplingMetadata(params, i, edits_of(params, (), 1, vocab)) for i in range(n_rows)]
    bucket = bucket_for((metadata, inputs) for metadata in rows)
    packed = pack_rows(n_rows, [(i, metadata, inputs) for i, metadata in enumerate(rows)], bucket)
    if mask is None:
        masks = jax.device_put(masks)  # one that is there already, as in the engine
    n_top = MIN_TOP if params.logprobs else 0
    numerics = Numerics(backend=resolve_backend("auto"))
    return lambda: jax.block_until_ready(
        sample_packed(logits, packed, masks, n_top=n_top, bucket=bucket, numerics=numerics)
    )


def taken(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def in_turns(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each; all of them take a turn in every round, after one to compile."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            seconds = taken(function)
            if i:
                times[name].append(seconds)
    return {name: statistics.median(found) for name, found in times.items()}


def table(rows: list[list[str]]) -> str:
    """Markdown; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(f"| {' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))} |" for row in rows)


def pipeline(vocab: int, numbers_of_rows: Iterable[int], rounds: int) -> str:
    """Microseconds a row of every setting."""
    columns: dict[str, dict[str, float]] = {}
    for n_rows in numbers_of_rows:
        for kind in (peaked, flat):
            logits = jax.device_put(kind(n_rows, vocab))
            found = in_turns({name: chooser(logits, name) for name in SETTINGS}, rounds)
            columns[f"{n_rows} rows, {kind.__name__}"] = {n: s / n_rows * 1e6 for n, s in found.items()}
    body = [[name, *(f"{column[name]:.0f}" for column in columns.values())] for name in SETTINGS]
    return table([[f"us a row, vocabulary {vocab}", *columns], *body])


def decode_seconds(llm: LLM) -> float:
    """Of a step with every row greedy, the choice included."""
    params = SamplingParams(temperature=0.0, max_tokens=4 * MODEL_STEPS, ignore_eos=True)
    prompts = np.random.default_rng(0).integers(0, llm.config.vocab_size, (MODEL_ROWS, 16))
    requests = [llm.engine.generate(prompt.tolist(), params, 0) for prompt in prompts]

    def tokens() -> int:
        return min(len(r.output.chunks) for r in requests)

    while tokens() < 2:
        llm.engine.step()
    first, begin = tokens(), time.perf_counter()
    while tokens() < first + MODEL_STEPS:
        llm.engine.step()
    seconds = (time.perf_counter() - begin) / (tokens() - first)
    for request in requests:
        llm.engine.cancel(request)
    return seconds


def beside_a_model(path: Path, rounds: int) -> str:
    """Every setting on a model's own logits, and its share of a decode step."""
    with LLM(path, max_batch=MODEL_ROWS, max_context=256) as llm:
        text = "Once upon a time, there was a little girl named Lily. She liked to play in the park. One day, she"
        logits = llm.logits(llm.tokenizer.encode(text) or range(1, MODEL_ROWS))[0]  # random models have no vocabulary
        chosen = jnp.asarray(logits[np.arange(MODEL_ROWS) % len(logits)])
        settings = {name: chooser(chosen, name) for name in SETTINGS}
        found: dict[str, list[float]] = {name: [] for name in SETTINGS}
        steps: list[float] = []
        decode_seconds(llm)  # compiles
        for _ in range(rounds):
            steps.append(decode_seconds(llm))
            for name, seconds in in_turns(settings, 1).items():
                found[name].append(seconds)
    step = statistics.median(steps)
    medians = {name: statistics.median(times) for name, times in found.items()}
    body = [[n, f"{s / MODEL_ROWS * 1e6:.0f}", f"{s / step:.1%}"] for n, s in medians.items()]
    title = f"{path}: vocabulary {logits.shape[1]}, {MODEL_ROWS} rows, {step * 1e3:.1f} ms a greedy decode step"
    return f"{title}\n\n{table([['its logits', 'us a row', 'of its decode step'], *body])}"


def masks_along(compiler: GrammarCompiler, grammar: Grammar, tokens: list[int]) -> list[float]:
    """Seconds for the mask after each token, the step to it included."""
    matcher, times = compiler.start(grammar), []
    for token in tokens:
        begin = time.perf_counter()
        matcher.advance(token)
        matcher.mask()
        times.append(time.perf_counter() - begin)
    assert matcher.is_accepting
    return times


def host(path: Path, contexts: Iterable[int], rounds: int) -> str:
    """Microseconds of the host for a step of one row."""
    tokenizer = Tokenizer.from_gguf(path)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    text = tokenizer.encode(json.dumps(PERSON), add_special=False)
    rows = [["host", "us a step, median", "most"]]

    def line(name: str, times: list[float]) -> None:
        rows.append([name, f"{statistics.median(times) * 1e6:.0f}", f"{max(times) * 1e6:.0f}"])

    for name, grammar in {"JSON schema": Grammar.json_schema(SCHEMA), "JSON in GBNF": Grammar.gbnf(JSON)}.items():
        line(f"mask, {name}", [t for _ in range(rounds) for t in masks_along(compiler, grammar, text)])
    params = SamplingParams(dry_multiplier=0.8, dry_breakers=())
    for n in contexts:
        ranks = np.random.default_rng(0).zipf(1.2, n) % (tokenizer.vocab_size - 1)
        for kind, tokens in {"a text": ranks.tolist(), "one token repeated": [tokenizer.vocab_size // 2] * n}.items():
            dry = Dry(params, tokenizer.token_bytes)
            for token in tokens:
                dry.push(token)
            line(f"DRY, {kind} of {n}", [taken(lambda d=dry, t=tokens: d.penalties(t)) for _ in range(10 * rounds)])
    return f"{path}: vocabulary {tokenizer.vocab_size}\n\n{table(rows)}"


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="also beside the decode step of this model")
    parser.add_argument("--tokenizer", type=Path, default=embedded_model(), help="a GGUF file with a vocabulary")
    parser.add_argument("--vocabularies", type=_numbers, default=[32000, 128000, 256000])
    parser.add_argument("--rows", type=_numbers, default=[1, 32, 256])
    parser.add_argument("--contexts", type=_numbers, default=[1024, 8192], help="tokens that DRY looks at")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="see only that it runs: one small size, two rounds")
    options = parser.parse_args()
    if options.quick:
        options.vocabularies, options.rows, options.contexts, options.rounds = [2000], [2], [64], 2
    device, load = jax.devices()[0].device_kind, os.getloadavg()[0]
    print(f"{device}, {os.cpu_count()} processors, load {load:.1f}, {options.rounds} rounds, medians\n")
    for vocab in options.vocabularies:
        print(f"{pipeline(vocab, options.rows, options.rounds)}\n", flush=True)
    if options.model:
        print(f"{beside_a_model(options.model, options.rounds)}\n", flush=True)
    print(f"{host(options.tokenizer, options.contexts, options.rounds)}")


if __name__ == "__main__":
    main()
