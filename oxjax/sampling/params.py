"""Sampling parameters of a request. Host only."""

from __future__ import annotations

import math
import numbers
import re
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from oxjax.constrain import Grammar
from oxjax.errors import InvalidRequestError

STAGES = (
    "temperature",
    "top_k",
    "typical_p",
    "top_p",
    "min_p",
    "top_a",
    "epsilon_cutoff",
    "eta_cutoff",
    "top_n_sigma",
    "xtc",
)
ALL_STAGES = (*STAGES, "mirostat_1", "mirostat_2")  # which come last
REPORTED = ("model", "sampling")
_SURROGATE = re.compile("[\ud800-\udfff]")
MOST_BIAS = 1e6  # beyond any logit, far below the largest float32


Check = Callable[[str, object], None]


def _whole(least: int, most: int = 2**31 - 1, *, optional: bool = False) -> Check:
    """A check that a value is a whole number within bounds."""

    def check(name: str, value: object) -> None:
        if optional and value is None:
            return
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not least <= int(value) <= most:
            raise InvalidRequestError(f"{name} {value!r}: expected a whole number from {least} to {most}")

    return check


def _real(least: float, most: float, *, above: bool = False) -> Check:
    """A check that a value is a finite number within bounds, or above the lower one."""
    bounds = f"{'more than' if above else 'at least'} {least}" + ("" if math.isinf(most) else f", at most {most}")

    def check(name: str, value: object) -> None:
        ok = isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        if not ok or not least <= float(value) <= most or (above and value == least):
            raise InvalidRequestError(f"{name} {value!r}: expected a number {bounds}")

    return check


_CHECKS = {
    "max_tokens": _whole(1, optional=True),
    "temperature": _real(0.0, math.inf),
    "top_k": _whole(0),
    "top_p": _real(0.0, 1.0, above=True),
    "min_p": _real(0.0, 1.0),
    "seed": _whole(0, 2**64 - 1, optional=True),
    "logprobs": _whole(0),
    "prompt_logprobs": _whole(0, optional=True),
    "repetition_penalty": _real(0.0, MOST_BIAS, above=True),
    "frequency_penalty": _real(-MOST_BIAS, MOST_BIAS),
    "presence_penalty": _real(-MOST_BIAS, MOST_BIAS),
    "penalty_window": _whole(0, optional=True),
    "temperature_range": _real(0.0, MOST_BIAS),
    "temperature_exponent": _real(0.0, MOST_BIAS, above=True),
    "typical_p": _real(0.0, 1.0, above=True),
    "top_a": _real(0.0, 1.0),
    "epsilon_cutoff": _real(0.0, 1.0),
    "eta_cutoff": _real(0.0, 1.0),
    "top_n_sigma": _real(0.0, MOST_BIAS),
    "xtc_probability": _real(0.0, 1.0),
    "xtc_threshold": _real(0.0, 0.5),
    "mirostat": _whole(0, 2),
    "mirostat_tau": _real(0.0, MOST_BIAS),
    "mirostat_eta": _real(0.0, 1.0, above=True),
    "dry_multiplier": _real(0.0, MOST_BIAS),
    "dry_base": _real(1.0, MOST_BIAS),
    "dry_allowed_length": _whole(1),
    "dry_window": _whole(1, optional=True),
}

# Parameters that have no effect without one of these.
_DETAILS = {
    "temperature_exponent": ("temperature_range",),
    "xtc_threshold": ("xtc_probability",),
    "mirostat_tau": ("mirostat",),
    "mirostat_eta": ("mirostat",),
    "penalty_window": ("repetition_penalty", "frequency_penalty", "presence_penalty"),
    **dict.fromkeys(("dry_base", "dry_allowed_length", "dry_window", "dry_breakers"), ("dry_multiplier",)),
}


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters: how the next token is chosen, and when a request ends.

    With logits x, probabilities p = softmax(x) of the tokens that are left, and entropy H = -Σ p ln p, the stages
    act in this order: bias and bans, penalties, DRY, grammar, greedy if `temperature` is 0, else the stages in
    `order`, mirostat, draw. Each stage works on the tokens that the one before left, and never removes the most
    likely one; only `xtc` and `typical_p` may. The defaults sample from the model's own distribution until it ends
    the text. Parameters that could have no effect are refused.

    Attributes:
        max_tokens: maximum number of tokens to generate; None continues to the end of the context.
        temperature: T in x / T; 0 takes the most likely token, the lowest id among equals.
        top_k: keep the k most likely tokens, lower ids first among equals; 0 keeps all.
        top_p: keep the smallest set of most likely tokens with Σ p >= top_p (nucleus sampling, Holtzman et al. 2020,
            https://arxiv.org/abs/1904.09751); 1 keeps all.
        min_p: keep tokens with p >= min_p max(p) (Nguyen et al. 2024, https://arxiv.org/abs/2407.01082); 0 keeps all.
        seed: 0 to 2^64 - 1. Together with model, prompt and the other parameters it determines the output. None takes a
            seed from the operating system, which the result reports.
        logprobs: number of most likely tokens to report at each step, besides the sampled token and its rank.
        stop: texts that end the generation; they are not part of the result's text.
        ignore_eos: continue after end-of-generation tokens.
        n: number of samples of the prompt. They share its computation; each has a seed of its own, the first `seed`,
            and its result names the seed that gives it alone.
        best_of: number of samples to draw instead, of which the `n` with the highest mean log-probability are returned.
        min_tokens: minimum number of tokens; before that, tokens that end the text are not sampled, and stop texts do
            not end it.
        logit_bias: numbers b[i] in x[i] + b[i], before all else: a mapping from ids, or pairs.
        banned_tokens: ids that are never sampled, whatever their bias.
        stop_token_ids: tokens that end the generation; they are part of the result's tokens, not of its text.
        repetition_penalty: r in x / r where x > 0, and x r elsewhere, for tokens in the penalty window, once per token
            (Keskar et al. 2019, https://arxiv.org/abs/1909.05858); 1 is off.
        frequency_penalty: f in x - f c, where c counts a token's occurrences in the penalty window; 0 is off.
        presence_penalty: a in x - a for tokens in the penalty window; 0 is off.
        penalty_window: number of last tokens, prompt included, that these penalties look at, as in llama.cpp; None is
            all, 0 none.
        temperature_range: R of llama.cpp's dynamic temperature, T - R + 2 R (H / ln(number of tokens left)) ^ e, at
            least 0 in place of T - R; 0 is off.
        temperature_exponent: e of the dynamic temperature.
        typical_p: keep the tokens with the smallest |-ln p - H| until Σ p > typical_p (locally typical sampling,
            Meister et al. 2023, https://arxiv.org/abs/2202.00666); 1 keeps all.
        top_a: keep tokens with p >= top_a max(p)^2 (BlinkDL's RWKV-LM); 0 keeps all.
        epsilon_cutoff: keep tokens with p >= epsilon (Hewitt et al. 2022, https://arxiv.org/abs/2210.15191); 0 keeps
            all.
        eta_cutoff: keep tokens with p >= min(eta, sqrt(eta) e^-H) (the same paper); 0 keeps all.
        top_n_sigma: keep tokens with x >= max(x) - n σ(x) (Tang et al. 2024, https://arxiv.org/abs/2411.07641); 0 keeps
            all.
        xtc_probability: probability, at each step, of excluding all tokens with p >= `xtc_threshold` but the least
            likely of them (p-e-w, text-generation-webui #6335); 0 is off.
        xtc_threshold: at most 0.5.
        mirostat: 1 or 2, the version of mirostat that steers the surprise -log2 p of sampled tokens towards
            `mirostat_tau` (Basu et al. 2020, https://arxiv.org/abs/2007.14966; version 2 as in llama.cpp); 0 is off.
        mirostat_tau: target surprise τ, in bits; μ starts at 2 τ.
        mirostat_eta: learning rate η in μ - η (surprise - τ).
        logprobs_of: "model" reports log-probabilities of the model's own distribution, "sampling" those of the
            distribution that the token is drawn from, after all stages (at `temperature` 0, before greedy).
        prompt_logprobs: number of most likely tokens to report for every prompt token but the first, besides the token
            and its rank, of the model's own distribution; None reports nothing.
        dry_multiplier: m in x - m b^(L - A) for tokens that would continue a repetition of L >= A tokens, with b =
            `dry_base` and A = `dry_allowed_length` (DRY, p-e-w, text-generation-webui #5677); 0 is off.
        dry_base: b above.
        dry_allowed_length: A above.
        dry_window: number of last tokens that are searched for repetitions, prompt included; None is all.
        dry_breakers: texts that no repetition extends across.
        grammar: language of the output; where nothing else can follow, the generation ends.
        order: names of the stages in their order, all that are in use.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    logprobs: int = 0
    stop: tuple[str, ...] | list[str] | str = ()
    ignore_eos: bool = False
    n: int = 1
    best_of: int | None = None
    min_tokens: int = 0
    logit_bias: Mapping[int, int | float] | tuple[Any, ...] | list[Any] = ()
    banned_tokens: tuple[int, ...] | list[int] = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_window: int | None = 64
    temperature_range: float = 0.0
    temperature_exponent: float = 1.0
    typical_p: float = 1.0
    top_a: float = 0.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    logprobs_of: str = "model"
    prompt_logprobs: int | None = None
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_window: int | None = None
    dry_breakers: tuple[str, ...] | list[str] = ("\n", ":", '"', "*")
    grammar: Grammar | None = None
    order: tuple[str, ...] | list[str] = STAGES

    def __post_init__(self) -> None:
        self._set("stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for name in ("order", "dry_breakers", "banned_tokens", "stop_token_ids"):
            self._set(name, tuple(getattr(self, name)))
        for name, check in _CHECKS.items():
            check(name, getattr(self, name))
        _whole(1)("n", self.n)
        _whole(self.n, optional=True)("best_of", self.best_of)
        _whole(0, 2**31 - 1 if self.max_tokens is None else self.max_tokens)("min_tokens", self.min_tokens)
        for name in ("banned_tokens", "stop_token_ids"):
            for i in getattr(self, name):
                _whole(0)(name, i)
        self._check_order()
        self._check_texts()
        self._check_effects()
        self._set("logit_bias", self._pairs_of_bias())

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_order(self) -> None:
        if not all(name in STAGES for name in self.order) or len(set(self.order)) < len(self.order):
            raise InvalidRequestError(f"order {self.order}: expected some of {', '.join(STAGES)}, each once")
        if missing := self._used - set(self.order):
            raise InvalidRequestError(f"order {self.order} leaves out {', '.join(sorted(missing))}, which are in use")

    def _check_texts(self) -> None:
        if not all(isinstance(s, str) and s for s in self.stop):
            raise InvalidRequestError(f"stop {self.stop!r}: expected non-empty strings")
        texts = all(isinstance(s, str) and s for s in self.dry_breakers)
        if not texts or _SURROGATE.search("".join(self.dry_breakers)):
            raise InvalidRequestError(f"dry_breakers {self.dry_breakers!r}: expected non-empty strings of characters")
        if self.logprobs_of not in REPORTED:
            raise InvalidRequestError(f"logprobs_of {self.logprobs_of!r}: expected {' or '.join(map(repr, REPORTED))}")
        if not isinstance(self.grammar, Grammar | None):
            raise InvalidRequestError(f"grammar {self.grammar!r}: expected an oxjax.Grammar")
        if self.grammar is not None and self.ignore_eos:
            raise InvalidRequestError("ignore_eos with a grammar, which says where the text ends")

    def _pairs_of_bias(self) -> tuple[tuple[int, float], ...]:
        bias = self.logit_bias
        pairs = tuple(bias.items() if isinstance(bias, Mapping) else bias)
        if not all(isinstance(p, tuple | list) and len(p) == 2 for p in pairs):
            raise InvalidRequestError(f"logit_bias {bias!r}: expected a mapping from token ids to numbers, or pairs")
        for i, value in pairs:
            _whole(0)("logit_bias", i)
            _real(-MOST_BIAS, MOST_BIAS)(f"logit_bias of token {i}", value)
        if len(dict(pairs)) < len(pairs):
            raise InvalidRequestError(f"logit_bias {bias!r}: expected each token once")
        return tuple((int(i), float(value)) for i, value in pairs)

    def _check_effects(self) -> None:
        """Refuse what would be ignored."""
        if self.temperature == 0.0:
            lost = ("temperature_range", "typical_p", "xtc_probability", "mirostat")
            if changed := [name for name in lost if self._changes(name)]:
                raise InvalidRequestError(f"{', '.join(changed)} at temperature 0, which takes the most likely token")
        for name, of in _DETAILS.items():
            if self._changes(name) and not any(map(self._changes, of)):
                raise InvalidRequestError(f"{name} has no effect without {' or '.join(of)}")

    def _changes(self, name: str) -> bool:
        return getattr(self, name) != type(self).__dataclass_fields__[name].default

    @property
    def _used(self) -> set[str]:
        used = {
            "temperature": self.temperature not in (0.0, 1.0) or self.temperature_range > 0.0,
            "top_k": self.top_k > 0,
            "typical_p": self.typical_p < 1.0,
            "top_p": self.top_p < 1.0,
            "xtc": self.xtc_probability > 0.0,
        }
        used |= {n: getattr(self, n) > 0.0 for n in STAGES if n not in used}
        return {name for name, is_used in used.items() if is_used}

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages in use, in the order in which they act."""
        used = self._used
        last = (f"mirostat_{self.mirostat}",) if self.mirostat else ()
        return *(name for name in self.order if name in used), *last

    @property
    def n_samples(self) -> int:
        """Number of samples that are drawn: `best_of`, or `n`."""
        return self.n if self.best_of is None else self.best_of

    @property
    def initial_mu(self) -> float:
        """Mirostat's mu before the first token, in bits (Basu et al. 2021, algorithm 2)."""
        return 2.0 * self.mirostat_tau

    @property
    def penalizes(self) -> bool:
        """A repetition, frequency or presence penalty is in use."""
        lowers = self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0
        return lowers and self.penalty_window != 0


def sample_seed(seed: int, i: int) -> int:
    """The seed of a request's sample `i`: `seed` itself for the first, well mixed 64 bits for the others."""
    if i == 0:
        return seed
    return int.from_bytes(
        blake2b(struct.pack("<QQ", seed, i), digest_size=8, person=b"oxjax sample").digest(), "little"
    )
