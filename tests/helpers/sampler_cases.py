"""Logits on which stages of the pipeline are compared with llama.cpp's samplers, and with definitions in float64.

Each comparison returns the logits that we leave and those that the other side leaves, `[n, vocab]`, -inf for what is
out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from oxjax import SamplingParams
from oxjax.assets import embedded_model
from oxjax.kernels.native import resolve_backend
from oxjax.kernels.numerics import Numerics
from oxjax.sampling.dry import Dry
from oxjax.sampling.edits import Edits, add_edits
from oxjax.sampling.packing import STAGE_PARAMETERS
from oxjax.sampling.params import ALL_STAGES
from oxjax.sampling.penalties import Penalties, penalize
from oxjax.sampling.stages import StageInputs, Stages, mirostat_after, run_stages
from oxjax.tokenizer import Tokenizer
from tests.helpers.llama_cpp_samplers import apply

VOCAB = 40
NUMERICS = Numerics(backend=resolve_backend("auto"))
run = jax.jit(jax.vmap(lambda x, s, uniform, mu: run_stages(x, s, StageInputs(uniform, mu, NUMERICS))))

Pair = tuple[np.ndarray, np.ndarray]


def _some_forbidden(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return np.where(rng.random(shape) < 0.3, -np.inf, rng.normal(size=shape) * 4)


def _one_left(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return np.where(np.arange(shape[1]) == rng.integers(0, shape[1], (shape[0], 1)), rng.normal(size=shape), -np.inf)


def _one_far_ahead(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.normal(size=shape) + 60 * (np.arange(shape[1]) == rng.integers(0, shape[1], (shape[0], 1)))


KINDS = {
    "normal": lambda rng, shape: rng.normal(size=shape) * 4,
    "tied": lambda rng, shape: np.round(rng.normal(size=shape) * 4),
    "some forbidden": _some_forbidden,
    "one left": _one_left,
    "one far ahead": _one_far_ahead,
    "all equal": lambda rng, shape: np.broadcast_to(rng.normal(size=(shape[0], 1)), shape),
    "nearly equal": lambda rng, shape: 3 + rng.normal(size=shape) * 1e-5,
    "tiny": lambda rng, shape: rng.normal(size=shape) * 1e-3,
    "huge": lambda rng, shape: rng.normal(size=shape) * 1e4,
}


def rows_of_logits(n: int, kinds: Sequence[str] = tuple(KINDS), seed: int = 0) -> np.ndarray:
    """Float32 `[n, VOCAB]`, the kinds in turn; no row is all forbidden."""
    rng, rows = np.random.default_rng(seed), np.empty((n, VOCAB), np.float32)
    for i, kind in enumerate(kinds):
        part = rows[i :: len(kinds)]
        part[:] = KINDS[kind](rng, part.shape)
        part[(part == -np.inf).all(axis=1), 0] = 0.0
    return rows


class Agreement(NamedTuple):
    """How far two sides agree.

    Attributes:
        rows: that were compared.
        same: the share with the same tokens left.
        alike: the share with as many left, whose logits are equal but for rounding and a constant that changes no
            probability: which of equal tokens goes may be left open.
        worst: the largest difference of a probability among those that are left, in rows of either kind.
    """

    rows: int
    same: float
    alike: float
    worst: float


def agreement(got: np.ndarray, expected: np.ndarray, rtol: float = 1e-5) -> Agreement:
    """How far these logits agree, row by row."""
    sides = got.astype(np.float64), expected.astype(np.float64)
    same = ((got > -np.inf) == (expected > -np.inf)).all(axis=1)
    most = [x.max(axis=1, keepdims=True) for x in sides]
    shifted = [x - np.where(m > -np.inf, m, 0.0) for x, m in zip(sides, most, strict=True)]
    # By id where that can be.
    a, b = (np.where(same[:, None], x, np.sort(x, axis=1)) for x in shifted)
    alike = np.isclose(a, b, rtol=rtol, atol=1e-5).all(axis=1)
    weights = [np.exp(x[same | alike]) for x in (a, b)]
    p, q = (w / np.maximum(w.sum(axis=1, keepdims=True), 1e-300) for w in weights)
    return Agreement(len(got), same.mean(), alike.mean(), np.abs(p - q).max(initial=0.0))


class Case(NamedTuple):
    """A stage, with settings that take turns. `sampler` is llama.cpp's with `args`; None where it has none such.

    No share is met by a whole number of equal tokens: rounding would say whether it is reached.
    """

    sampler: str | None
    args: Callable[[SamplingParams], list[float]] | None
    settings: list[dict[str, float]]
    kinds: tuple[str, ...] = tuple(KINDS)
    rtol: float = 1e-5


# llama.cpp's entropy and mirostat's fit there are not numbers where a probability is 0, and k overflows on flat rows.
_POSSIBLE = tuple(name for name in KINDS if name not in ("some forbidden", "one left", "huge"))
_STEEP = "normal", "one far ahead"
# Where nothing is likely enough for mirostat 2, one of the most likely stays there, and here all that are equal.
_DISTINCT = tuple(name for name in KINDS if name not in ("tied", "all equal", "nearly equal"))

STAGE_CASES = {
    "temperature": Case("temp", lambda p: [p.temperature], [{"temperature": x} for x in (0.2, 0.7, 1.5, 9.0)]),
    "dynamic temperature": Case(
        "temp_ext",
        lambda p: [p.temperature, p.temperature_range, p.temperature_exponent],
        [
            {"temperature": t, "temperature_range": r, "temperature_exponent": e}
            for t, r, e in [(1.0, 0.5, 1.0), (0.7, 0.69, 2.0)]
        ],
        _POSSIBLE,
        1e-3,  # nearly certain rows: a temperature near 0, as inexact as the sum of tiny terms that it comes from
    ),
    "top_k": Case("top_k", lambda p: [p.top_k], [{"top_k": k} for k in (1, 3, 39, 40, 100)]),
    "typical_p": Case("typical", lambda p: [p.typical_p, 1], [{"typical_p": x} for x in (0.21, 0.61, 0.94)], _POSSIBLE),
    "top_p": Case("top_p", lambda p: [p.top_p, 1], [{"top_p": x} for x in (0.11, 0.51, 0.91, 0.999)]),
    "min_p": Case("min_p", lambda p: [p.min_p, 1], [{"min_p": x} for x in (0.01, 0.2, 1.0)]),
    "top_n_sigma": Case("top_n_sigma", lambda p: [p.top_n_sigma], [{"top_n_sigma": x} for x in (0.3, 1.0, 2.5)]),
    "xtc": Case(
        "xtc",
        lambda p: [1.0, p.xtc_threshold, 1, 7],
        [{"xtc_probability": 1.0, "xtc_threshold": x} for x in (0.02, 0.1, 0.3)],
    ),
    "top_a": Case(None, None, [{"top_a": x} for x in (0.05, 0.3, 0.9)]),
    "epsilon_cutoff": Case(None, None, [{"epsilon_cutoff": x} for x in (0.001, 0.02, 0.3)]),
    "eta_cutoff": Case(None, None, [{"eta_cutoff": x} for x in (0.001, 0.02, 0.3)]),
}


def stage(name: str, n: int) -> Pair:
    """A stage of `STAGE_CASES`."""
    case, logits = STAGE_CASES[name], rows_of_logits(n, STAGE_CASES[name].kinds)
    params = [SamplingParams(**case.settings[i // len(case.kinds) % len(case.settings)]) for i in range(n)]
    chance = jnp.zeros(n)  # llama.cpp draws its own for XTC: both are below 1
    got = np.asarray(run(jnp.asarray(logits), columns(params, n), chance, chance))
    if case.sampler is None:
        rows = zip(logits.astype(np.float64), params, strict=True)
        return got, np.stack([shaped(x, p, name) for x, p in rows])
    return got, apply(logits, [{"sampler": case.sampler, "args": case.args(p)} for p in params])


def penalties(n: int) -> Pair:
    """All three, after texts of up to 32 tokens."""
    rng, logits = np.random.default_rng(1), rows_of_logits(n)
    window = rng.choice([0, 1, 5, 31, 32], n).astype(np.int32)
    repetition = rng.choice([1.0, 1.1, 0.8, 3.0], n).astype(np.float32)
    frequency = rng.choice([0.0, 0.3, -0.5], n).astype(np.float32)
    presence = rng.choice([0.0, 1.5, -0.25], n).astype(np.float32)
    recent = rng.integers(0, VOCAB // 2, (n, 32)).astype(np.int32)
    recent[::4, :20] = -1  # short texts
    given = Penalties(*map(jnp.asarray, (window, repetition, frequency, presence, recent)))
    got = jax.jit(penalize)(jnp.asarray(logits), given)
    numbers = zip(window.tolist(), repetition.tolist(), frequency.tolist(), presence.tolist(), recent, strict=True)
    cases = [{"sampler": "penalties", "args": [VOCAB, *x], "accepted": r[r >= 0].tolist()} for *x, r in numbers]
    return np.asarray(got), apply(logits, cases)


def biases(n: int) -> Pair:
    """Six biases a row, some of them bans."""
    rng, logits = np.random.default_rng(2), rows_of_logits(n)
    ids = np.stack([rng.permutation(VOCAB)[:6] for _ in range(n)]).astype(np.int32)
    values = rng.choice([0.0, 2.5, -3.0, -np.inf], ids.shape).astype(np.float32)
    edits = Edits(jnp.asarray(ids), jnp.ones_like(ids), jnp.asarray(values), jnp.zeros_like(ids))
    got = jax.jit(add_edits)(jnp.asarray(logits), edits, jnp.zeros(n, jnp.int32))
    pairs = [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return np.asarray(got), apply(logits, [{"sampler": "logit_bias", "args": p} for p in pairs])


def mirostat(version: int, n: int) -> Pair:
    """After four tokens of llama.cpp's choice, each of which moved mu by its surprise."""
    rounds, kinds = 4, _STEEP if version == 1 else _DISTINCT
    settings, logits = [(1.0, 0.3), (2.5, 1.0), (4.0, 0.1)], rows_of_logits(n, kinds)
    turns = (settings[i // len(kinds) % len(settings)] for i in range(n))
    params = [SamplingParams(mirostat=version, mirostat_tau=tau, mirostat_eta=eta) for tau, eta in turns]
    cases = []
    for i, p in enumerate(params):
        args = [i, p.mirostat_tau, p.mirostat_eta]
        case = {"sampler": "mirostat", "args": [VOCAB, *args, 100]} if version == 1 else None
        cases.append((case or {"sampler": "mirostat_v2", "args": args}) | {"rounds": rounds})
    given = apply(logits, cases)
    expected, chosen = given[:, :VOCAB], given[:, VOCAB:].astype(int)
    stages, x = columns(params, n), jnp.asarray(logits)
    mus = jnp.asarray([2.0 * p.mirostat_tau for p in params], jnp.float32)
    for i in range(rounds):
        left = run(x, stages, jnp.zeros(n), mus)
        found = jax.nn.log_softmax(left)[jnp.arange(n), chosen[:, i]]
        mus = mirostat_after(mus, found, stages)
    return np.asarray(left), expected


def repetitions(n: int) -> Pair:
    """DRY's penalties after texts of few words, with breakers within and across what repeats."""
    path, rng = embedded_model(), np.random.default_rng(7)
    tokenizer = Tokenizer.from_gguf(path)
    words = tokenizer.vocab_bytes()
    some = [i for i, word in enumerate(words) if len(word) > 2 and word.strip().isalpha()][:7]
    breakers = [tokenizer.encode(t, add_special=False)[-1] for t in ("\n", '"')]
    cases, got = [], np.zeros((n, len(words)), np.float32)
    for i in range(n):
        alphabet = rng.permutation(some)[: rng.integers(1, 7)].tolist() + breakers * int(rng.random() < 0.3)
        tokens = rng.choice(alphabet, rng.integers(1, 200)).tolist()
        p = SamplingParams(
            dry_multiplier=float(rng.uniform(0.1, 3)),
            dry_base=float(rng.uniform(1.01, 3)),
            dry_allowed_length=int(rng.integers(1, 6)),
            dry_window=[None, int(rng.integers(1, 250))][int(rng.integers(2))],
        )
        dry = Dry(p, tokenizer.token_bytes)
        for token in tokens:
            dry.push(token)
        for token, penalty in dry.penalties(tokens):
            got[i, token] -= np.float32(penalty)
        window = 4096 if p.dry_window is None else p.dry_window
        args = [p.dry_multiplier, p.dry_base, p.dry_allowed_length, window, p.dry_breakers]
        cases.append({"sampler": "dry", "args": args, "accepted": tokens, "vocab": str(path)})
    # What overflows there stays finite here: no penalty forbids.
    return got, np.maximum(apply(np.zeros_like(got), cases), np.finfo(np.float32).min)


def columns(params: SamplingParams | Sequence[SamplingParams], n: int) -> Stages:
    """The stages of `n` rows with these parameters, or of a row for each of several."""
    every = [params] * n if isinstance(params, SamplingParams) else params
    orders = [[ALL_STAGES.index(name) for name in p.stages] for p in every]
    order = np.array([o + [0] * (len(ALL_STAGES) - len(o)) for o in orders])
    fields = {name: np.array([getattr(p, name) for p in every], kind) for name, kind in STAGE_PARAMETERS}
    fields |= {"order": order.astype(np.int32), "n_stages": np.array([len(o) for o in orders], np.int32)}
    return Stages(**{name: jnp.asarray(value) for name, value in fields.items()})


def shaped(x: np.ndarray, p: SamplingParams, stage: str) -> np.ndarray:
    """Logits after a stage, by the definitions in `SamplingParams`, in float64; those that are out are -inf."""
    alive = np.flatnonzero(x > -np.inf)
    w = np.exp(x - x.max())
    w /= w.sum()
    h = -(w[w > 0] * np.log(w[w > 0])).sum()
    best_first = sorted(alive, key=lambda i: (-x[i], i))

    def until(order, share):
        held = np.cumsum([0.0, *w[order][:-1]])
        return [i for i, before in zip(order, held, strict=True) if before < share]

    if stage == "temperature":
        least, most = max(p.temperature - p.temperature_range, 0.0), p.temperature + p.temperature_range
        share = 0.0 if len(alive) == 1 else h / np.log(len(alive))
        return x / (least + (most - least) * share**p.temperature_exponent)
    stay = {
        "top_k": lambda: best_first[: p.top_k],
        "top_p": lambda: until(best_first, p.top_p),
        "typical_p": lambda: until(sorted(alive, key=lambda i: abs(-np.log(w[i]) - h)), p.typical_p),
        "min_p": lambda: w >= p.min_p * w.max(),
        "top_a": lambda: w >= p.top_a * w.max() ** 2,
        "epsilon_cutoff": lambda: (w >= p.epsilon_cutoff) | (w == w.max()),
        "eta_cutoff": lambda: (w >= min(p.eta_cutoff, np.sqrt(p.eta_cutoff) * np.exp(-h))) | (w == w.max()),
        "top_n_sigma": lambda: x >= x.max() - p.top_n_sigma * x[alive].std(),
    }[stage]()
    out = np.full_like(x, -np.inf)
    out[stay] = x[stay]
    return out
