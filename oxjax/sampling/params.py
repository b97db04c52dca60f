"""What a request asks of the sampler. Host only."""

from __future__ import annotations

import math
import numbers
import re
import struct
import sys
from collections.abc import Mapping
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
MOST_BIAS = 1e6  # more than any logit, and far from what float32 ends at


# What says more about what others ask for.
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
    """How to choose the next token, and when to stop.

    The stages act in this order: bias and bans, penalties, DRY, grammar, greedy if `temperature` is 0, else those of
    `order`, mirostat, draw. The defaults draw from the model's own distribution until it ends the text. Every stage
    works on what the one before left, and probabilities are those of what is left; none takes the most likely token
    away, but `xtc` and `typical_p`. What can have no effect is refused.

    Attributes:
        max_tokens: most tokens to generate; None goes on to the end of the context.
        min_tokens: until there are so many, tokens that would end the text are not chosen, and stop texts do not
            end it.
        temperature: divides the logits; 0 takes the most likely token, the lowest id among equals.
        temperature_range: lets the temperature vary so much to either side of `temperature`, by how large the entropy
            is: least + (most - least) * (entropy / log of the number of tokens left) ^ `temperature_exponent`
            (llama.cpp's dynamic temperature); 0 does not.
        temperature_exponent: see there.
        top_k: keep the k most likely tokens, lower ids first among equals; 0 keeps all.
        top_p: keep the smallest set of most likely tokens that holds at least this share of what top-k left
            (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751); 1 keeps all.
        min_p: keep tokens at least this likely relative to the most likely one
            (Nguyen et al. 2024, https://arxiv.org/abs/2407.01082); 0 keeps all.
        typical_p: keep the tokens whose surprise is closest to the entropy, until they hold this share
            (Meister et al. 2023, https://arxiv.org/abs/2202.00666); 1 keeps all.
        top_a: keep tokens at least as likely as this times the square of the largest probability (BlinkDL's
            RWKV-LM); 0 keeps all.
        epsilon_cutoff: keep tokens at least this likely (Hewitt et al. 2022, https://arxiv.org/abs/2210.15191); 0
            keeps all.
        eta_cutoff: the same, with sqrt(eta) * e^-entropy as the bound where that is less (there); 0 keeps all.
        top_n_sigma: keep tokens whose logits are within this many standard deviations of the largest
            (Tang et al. 2024, https://arxiv.org/abs/2411.07641); 0 keeps all.
        xtc_probability: how often, step by step, all tokens above `xtc_threshold` but the least likely of them are
            excluded (p-e-w, text-generation-webui #6335).
        xtc_threshold: a probability up to 0.5.
        mirostat: 1 or 2 steers the surprise of what is drawn to `mirostat_tau`, by that version of mirostat (Basu et
            al. 2020, https://arxiv.org/abs/2007.14966; the second as llama.cpp has it), on what the stages left; 0 does
            not.
        mirostat_tau: in bits.
        mirostat_eta: how fast.
        order: the stages, by the names of their parameters, in the order in which they act: all that are in use.
        seed: 0 to 2^64 - 1. Together with model, prompt and these parameters it determines the output.
            None takes one from the operating system, which the result reports.
        logprobs: how many of the most likely tokens to report at each step, besides the chosen one, and its rank.
        logprobs_of: "model" reports log-probabilities of the model's own distribution, "sampling" those of what is
            drawn from, after all stages; at `temperature` 0 after those before greedy.
        prompt_logprobs: the same of every token of the prompt but the first, with this many of the most likely tokens;
            of the model's own distribution. None does not.
        logit_bias: what is added to the logits of single tokens, before all else: a mapping from ids, or pairs.
        banned_tokens: ids that are never chosen, whatever their bias.
        repetition_penalty: divides the logits of tokens that the text has lately had, where they are positive, and
            multiplies them where they are not, once however often a token occurs (Keskar et al. 2019,
            https://arxiv.org/abs/1909.05858); 1 leaves them.
        frequency_penalty: what is then subtracted for each time that it occurs.
        presence_penalty: what is subtracted once.
        penalty_window: how many of the last tokens these penalties look at, prompt included, as in llama.cpp; None
            takes all, 0 none.
        dry_multiplier: what is subtracted from the logits of tokens that continue a repetition which has
            `dry_allowed_length` tokens (p-e-w, text-generation-webui #5677); 0 does not.
        dry_base: that much more for every token that the repetition has more.
        dry_allowed_length: see there.
        dry_window: how many of the last tokens are searched, prompt included; None takes all.
        dry_breakers: texts that no repetition goes across.
        stop: texts that end the generation; they are not part of the result's text.
        stop_token_ids: tokens that end it; they are part of the result's tokens, not of its text.
        ignore_eos: go on after end-of-generation tokens.
        grammar: the language that the output has to be in; where nothing else can follow, the end does.
        n: how many samples of the prompt to draw. The prompt is computed once; each sample has a seed of its own,
            the first one `seed`, and its result names the seed that gives it alone.
        best_of: how many to draw instead, of which the `n` are given whose tokens are the most likely on average.
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
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        _whole("max_tokens", self.max_tokens, 1, optional=True)
        _real("temperature", self.temperature, 0.0, math.inf)
        _whole("top_k", self.top_k, 0)
        _real("top_p", self.top_p, 0.0, 1.0, above=True)
        _real("min_p", self.min_p, 0.0, 1.0)
        _real("temperature_range", self.temperature_range, 0.0, MOST_BIAS)
        _real("temperature_exponent", self.temperature_exponent, 0.0, MOST_BIAS, above=True)
        _real("typical_p", self.typical_p, 0.0, 1.0, above=True)
        for name in ("top_a", "epsilon_cutoff", "eta_cutoff", "xtc_probability"):
            _real(name, getattr(self, name), 0.0, 1.0)
        _real("top_n_sigma", self.top_n_sigma, 0.0, MOST_BIAS)
        _real("xtc_threshold", self.xtc_threshold, 0.0, 0.5)
        object.__setattr__(self, "order", tuple(self.order))
        if not all(name in STAGES for name in self.order) or len(set(self.order)) < len(self.order):
            raise InvalidRequestError(f"order {self.order}: expected some of {', '.join(STAGES)}, each once")
        if missing := self._used - set(self.order):
            raise InvalidRequestError(f"order {self.order} leaves out {', '.join(sorted(missing))}, which are in use")
        _whole("mirostat", self.mirostat, 0, 2)
        _real("mirostat_tau", self.mirostat_tau, 0.0, MOST_BIAS)
        _real("mirostat_eta", self.mirostat_eta, 0.0, 1.0, above=True)
        self._check_dry()
        self._check_effects()
        _whole("seed", self.seed, 0, 2**64 - 1, optional=True)
        self._check_logprobs()
        _whole("n", self.n, 1)
        _whole("best_of", self.best_of, self.n, optional=True)
        _real("repetition_penalty", self.repetition_penalty, 0.0, MOST_BIAS, above=True)
        _real("frequency_penalty", self.frequency_penalty, -MOST_BIAS, MOST_BIAS)
        _real("presence_penalty", self.presence_penalty, -MOST_BIAS, MOST_BIAS)
        _whole("penalty_window", self.penalty_window, 0, optional=True)
        _whole("min_tokens", self.min_tokens, 0, 2**31 - 1 if self.max_tokens is None else self.max_tokens)
        if not all(isinstance(s, str) and s for s in self.stop):
            raise InvalidRequestError(f"stop {self.stop!r}: expected non-empty strings")
        if not isinstance(self.grammar, Grammar | None):
            raise InvalidRequestError(f"grammar {self.grammar!r}: expected an oxjax.Grammar")
        if self.grammar is not None and self.ignore_eos:
            raise InvalidRequestError("ignore_eos with a grammar, which says where the text ends")
        for name in ("banned_tokens", "stop_token_ids"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            for i in getattr(self, name):
                _whole(name, i, 0)
        bias = self.logit_bias
        pairs = tuple(bias.items() if isinstance(bias, Mapping) else bias)
        if not all(isinstance(p, tuple | list) and len(p) == 2 for p in pairs):
            raise InvalidRequestError(f"logit_bias {bias!r}: expected a mapping from token ids to numbers, or pairs")
        for i, value in pairs:
            _whole("logit_bias", i, 0)
            _real(f"logit_bias of token {i}", value, -MOST_BIAS, MOST_BIAS)
        if len(dict(pairs)) < len(pairs):
            raise InvalidRequestError(f"logit_bias {bias!r}: expected each token once")
        object.__setattr__(self, "logit_bias", tuple((int(i), float(value)) for i, value in pairs))

    def _check_logprobs(self) -> None:
        _whole("logprobs", self.logprobs, 0)
        _whole("prompt_logprobs", self.prompt_logprobs, 0, optional=True)
        if self.logprobs_of not in REPORTED:
            raise InvalidRequestError(f"logprobs_of {self.logprobs_of!r}: expected {' or '.join(map(repr, REPORTED))}")

    def _check_dry(self) -> None:
        _real("dry_multiplier", self.dry_multiplier, 0.0, MOST_BIAS)
        _real("dry_base", self.dry_base, 1.0, MOST_BIAS)
        _whole("dry_allowed_length", self.dry_allowed_length, 1)
        _whole("dry_window", self.dry_window, 1, optional=True)
        object.__setattr__(self, "dry_breakers", tuple(self.dry_breakers))
        texts = all(isinstance(s, str) and s for s in self.dry_breakers)
        if not texts or _SURROGATE.search("".join(self.dry_breakers)):
            raise InvalidRequestError(f"dry_breakers {self.dry_breakers!r}: expected non-empty strings of characters")

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
        """Those in use, in the order in which they act."""
        used = self._used
        last = (f"mirostat_{self.mirostat}",) if self.mirostat else ()
        return *(name for name in self.order if name in used), *last

    @property
    def n_samples(self) -> int:
        """How many samples are drawn."""
        return self.n if self.best_of is None else self.best_of

    @property
    def initial_mu(self) -> float:
        """Mirostat's mu before the first token, in bits (Basu et al. 2021, algorithm 2)."""
        return 2.0 * self.mirostat_tau

    @property
    def penalizes(self) -> bool:
        """Whether the last tokens matter."""
        lowers = self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0
        return lowers and self.penalty_window != 0


def sample_seed(seed: int, i: int) -> int:
    """The seed of a request's sample `i`: `seed` itself for the first, well mixed 64 bits for the others."""
    if i == 0:
        return seed
    return int.from_bytes(
        blake2b(struct.pack("<QQ", seed, i), digest_size=8, person=b"oxjax sample").digest(), "little"
    )


def _whole(name: str, value: object, least: int, most: int = 2**31 - 1, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not least <= value <= most:
        raise InvalidRequestError(f"{name} {value!r}: expected a whole number from {least} to {most}")


def _real(name: str, value: object, least: float, most: float, *, above: bool = False) -> None:
    ok = isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not ok or not least <= value <= most or (above and value == least):
        bounds = f"{'more than' if above else 'at least'} {least}" + ("" if math.isinf(most) else f", at most {most}")
        raise InvalidRequestError(f"{name} {value!r}: expected a number {bounds}")
