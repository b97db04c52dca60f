"""oxjax as a model of EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness)."""

from __future__ import annotations

import inspect
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import warning_once
from tqdm import tqdm

import oxjax
from oxjax.engine.metrics import Metrics
from oxjax.engine.snapshot import model_fingerprint
from oxjax.errors import ChatTemplateError, InvalidRequestError
from oxjax.evaluate.manifest import read_day, today
from oxjax.evaluate.pairs import begin, empty_context, encode_pair, windows
from oxjax.llm import LLM
from oxjax.results import Score
from oxjax.sampling.params import SamplingParams

logger = logging.getLogger(__name__)

AUTO_BATCH = 32
_OPTIONS = set(inspect.signature(LLM).parameters) - {"model", "progress", "removed"}
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = {f.name for f in fields(SamplingParams)} - {
    *("max_tokens", "stop", "stop_token_ids", "seed", "temperature", "grammar"),
    *("n", "best_of", "logprobs", "logprobs_of", "prompt_logprobs"),
}
_PENALTIES = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
_DATED = "strftime_now"  # in templates that tell the date
_END = "\ufdd0"  # never a character of a text (Unicode 23.7); here the end of an answer that goes on


@register_model("oxjax")
class OxjaxLM(LM):
    """A GGUF file as the harness's model `oxjax`; the arguments are those of `--model_args`.

    All requests of a kind run in one call of the engine. In `exact` mode results depend neither on `batch_size` nor on
    the order or number of requests.

    Texts come from the harness as whole prompts, so the texts of control tokens are read as these tokens, as its own
    models do, also where a document spells them. A BOS that the file asks for is added unless the prompt, rendered by
    a chat template for example, begins with it; an EOS never is. In `loglikelihood_rolling` the prefix token stands
    before a document once. (The harness's `hf` lets tokenizers that add BOS do so too, and scores that second one.)

    Args:
        model, pretrained: see `LLM`; give one of them, or none for the embedded model.
        max_length: maximum number of tokens of a prompt and its output together (`max_context` of `LLM`); longer
            prompts are truncated from the left.
        max_gen_toks: maximum number of tokens to generate, if a task does not set it.
        batch_size: number of sequences that run at once; "auto" and "auto:N" mean `max_batch_size`, 32 by default.
        max_batch_size: value of `batch_size` "auto".
        device: the platform that jax runs on, or "cuda:0", which the harness's command always passes; `JAX_PLATFORMS`
            selects the platform.
        enable_thinking: variable of chat templates; None leaves it unset.
        date: YYYY-MM-DD, today's date for chat templates; None is today.
        options: further arguments of `LLM`; `max_batch` overrules `batch_size`.

    Raises:
        InvalidRequestError: an argument is unknown, or contradicts another.
        GGUFError, ModelError, UnsupportedArchitectureError, TokenizerError: see `LLM`.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        pretrained: str | Path | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        enable_thinking: bool | None = None,
        date: str | None = None,
        **options: Any,
    ):
        super().__init__()
        self._date = read_day(today() if date is None else date)
        if unknown := set(options) - _OPTIONS - {"quantize"}:  # which `LLM` refuses with its new spelling
            known = (set(inspect.signature(OxjaxLM).parameters) | _OPTIONS) - {"options"}
            raise InvalidRequestError(
                f"model arguments {', '.join(sorted(unknown))}: expected some of {', '.join(sorted(known))}"
            )
        _check_device(device)
        options.setdefault("max_batch", _max_batch(batch_size, max_batch_size))
        if max_length is not None:
            options["max_context"] = _either("max_length", max_length, "max_context", options.get("max_context"))
        model = _either("model", model, "pretrained", pretrained)
        self.llm = LLM(model, **options)
        self.max_gen_toks = max_gen_toks
        self._name = "embedded" if model is None else Path(model).name
        self._variables = {} if enable_thinking is None else {"enable_thinking": enable_thinking}

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, with True for those that greedy decoding would generate.

        Args:
            requests: of a context and a continuation each; see `oxjax.evaluate.pairs.encode_pair`.
            disable_tqdm: show no progress.

        Raises:
            InvalidRequestError: a continuation has no tokens, or more than fit.
            RequestError: see `LLM.score`.
        """
        pairs, n_cut = [], 0
        for i, request in enumerate(requests):
            context, continuation = encode_pair(self.llm.tokenizer, *_arguments(request))
            if len(continuation) > self.llm.max_context:
                raise InvalidRequestError(
                    f"request {i}: its continuation {_arguments(request)[1]!r:.60} has {len(continuation)} tokens, and "
                    f"{self.llm.max_context} fit: raise max_length"
                )
            room = max(self.llm.max_context + 1 - len(continuation), 1)  # the last token is not read
            n_cut += len(context) > room
            pairs.append((context[-room:], continuation))
        self._report_cut(n_cut, len(pairs))
        answers, keep = self._answers("loglikelihood", requests)
        with self._bar("loglikelihood", len(pairs), disable_tqdm) as progress:
            self.llm.score(pairs, progress=progress, on_result=lambda i, s: keep(i, (s.logprob, s.is_greedy)))
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole documents, in windows of `max_length` tokens, the last one full too.

        Args:
            requests: of one text each.
            disable_tqdm: show no progress.

        Raises:
            RequestError: see `LLM.score`.
        """
        pairs: list[tuple[list[int], list[int]]] = []
        texts: list[int] = []  # whose window each of them is
        prefix = empty_context(self.llm.tokenizer)
        for i, request in enumerate(requests):
            ids = self.llm.tokenizer.encode(cast("tuple[str]", request.args)[0], add_special=False)
            ids = ids if ids[: len(prefix)] == prefix else prefix + ids
            rolling = list(windows(len(ids), self.llm.max_context, self.llm.max_context))
            pairs += [(ids[w.start : w.first], ids[w.first : w.end]) for w in rolling]
            texts += [i] * len(rolling)
        answers, keep = self._answers("loglikelihood_rolling", requests)
        n_windows = Counter(texts)
        found: list[list[float]] = [[] for _ in requests]
        for i in set(range(len(requests))) - set(n_windows):  # a text without tokens
            keep(i, 0.0)

        def add(k: int, score: Score) -> None:
            i = texts[k]
            found[i].append(score.logprob)
            if len(found[i]) == n_windows[i]:
                keep(i, math.fsum(found[i]))

        with self._bar("loglikelihood_rolling", len(pairs), disable_tqdm) as progress:
            self.llm.score(pairs, progress=progress, on_result=add)
        return answers

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate continuations of prompts.

        Generation arguments are `until` (or `stop`), `max_gen_toks` (or `max_new_tokens`, `max_tokens`,
        `max_completion_tokens`; of several the first of these counts), `do_sample`, `temperature`, `seed` and the
        sampling fields of `SamplingParams`. Without `do_sample` and `temperature` decoding is greedy; `do_sample` alone
        samples at temperature 1. Penalties cover the whole text unless `penalty_window` is given.

        A sampled request has a seed derived from `seed` (default 0; the harness's own `--seed` is not passed on), its
        prompt and arguments, and the number of equal requests before it. So runs repeat, repeats of a request differ,
        and other requests have no influence.

        Args:
            requests: of a prompt and generation arguments each.
            disable_tqdm: show no progress.

        Raises:
            InvalidRequestError: arguments are unknown or contradict each other, or leave no room for a prompt.
            RequestError: see `LLM.generate`.
        """
        prompts, params, n_cut = [], [], 0
        known: dict[str, SamplingParams] = {}
        seen: Counter[tuple[str, str]] = Counter()
        for request in requests:
            context, arguments = _arguments(request)
            how = json.dumps(arguments, sort_keys=True)
            if how not in known:
                known[how] = self._sampling_params(arguments)
            room = self.llm.max_context - (known[how].max_tokens or 0)
            ids = begin(self.llm.tokenizer, context) or empty_context(self.llm.tokenizer)
            n_cut += len(ids) > room
            prompts.append(ids[-room:])
            params.append(replace(known[how], seed=_seed(known[how].seed, context, how, seen[context, how])))
            seen[context, how] += 1
        self._report_cut(n_cut, len(prompts))
        answers, keep = self._answers("generate_until", requests)
        with self._bar("generate_until", len(prompts), disable_tqdm) as progress:
            self.llm.generate(prompts, params, progress=progress, on_result=lambda i, r: keep(i, r.text))
        return answers

    def _answers(self, kind: str, requests: Sequence[Instance]) -> tuple[list[Any], Callable[[int, Any], None]]:
        """List for the answers of a call, and a callback that stores each one and passes it to the harness's cache."""
        answers: list[Any] = [None] * len(requests)

        def keep(i: int, answer: Any) -> None:
            answers[i] = answer
            self.cache_hook.add_partial(kind, requests[i].args, answer)

        return answers, keep

    def _sampling_params(self, arguments: Mapping[str, Any]) -> SamplingParams:
        """Sampling parameters of generation arguments; the seeds of requests are derived from their seed."""
        given = {name: value for name, value in arguments.items() if value is not None}
        lengths = {name: given.pop(name) for name in _LENGTHS if name in given}
        if len(set(lengths.values())) > 1:
            logger.warning("generation arguments %s: the first one counts", lengths)
        try:
            max_tokens = int(next(iter(lengths.values()), self.max_gen_toks))
        except (TypeError, ValueError):
            raise InvalidRequestError(f"generation arguments {lengths}: expected whole numbers") from None
        if max_tokens >= self.llm.max_context:
            raise InvalidRequestError(
                f"{max_tokens} tokens to generate leave no room for a prompt in {self.llm.max_context}: lower "
                "max_gen_toks, or raise max_length"
            )
        stop = [text for name in ("until", "stop") for text in _texts(given.pop(name, ())) if text]
        temperature = given.pop("temperature", None)
        if not given.pop("do_sample", bool(temperature)):
            if temperature:
                logger.warning("temperature %s has no effect with do_sample=False", temperature)
            temperature = 0.0
        seed = given.pop("seed", 0)
        if given.get("num_beams") == 1:  # as many tasks say, and as it is
            del given["num_beams"]
        if unknown := set(given) - _SAMPLING:
            raise InvalidRequestError(
                f"generation arguments {', '.join(sorted(unknown))}: expected some of do_sample, max_gen_toks, seed, "
                f"temperature, until, {', '.join(sorted(_SAMPLING))}"
            )
        if any(given.get(name, neutral) != neutral for name, neutral in _PENALTIES.items()):
            given.setdefault("penalty_window", None)
        tokenizer = self.llm.tokenizer
        # Control tokens have no text in an output.
        ends = [i for text in stop if (i := tokenizer.id_of(text)) is not None and tokenizer.is_special(i)]
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if temperature is None else temperature,
            stop=stop,
            stop_token_ids=ends,
            seed=seed,
            **given,
        )

    @contextmanager
    def _bar(self, kind: str, n: int, disable: bool) -> Iterator[Callable[[Metrics], None]]:
        """Progress bar of finished requests on standard error."""
        before = self.llm.metrics().finished
        with tqdm(total=n, desc=f"Running {kind} requests", disable=disable) as bar:

            def show(metrics: Metrics) -> None:
                bar.update(metrics.finished - before - bar.n)

            yield show

    def _report_cut(self, n_cut: int, n: int) -> None:
        if n_cut:
            logger.warning(
                "%d of %d requests do not fit in %d tokens and were cut at the start (see max_length)",
                n_cut, n, self.llm.max_context,
            )  # fmt: skip

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Render a conversation to its prompt text with the file's template.

        A template that refuses system messages gets the conversation without them, with a warning, as for the
        harness's own models.

        Args:
            chat_history: dicts with `role` and `content`.
            add_generation_prompt: open the assistant's answer; False continues the last message.

        Raises:
            ChatTemplateError: there is no template, or it rejected the conversation.
        """
        try:
            return self._render(chat_history, add_generation_prompt)
        except ChatTemplateError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            text = self._render(others, add_generation_prompt)
            warning_once(
                logger, f"the chat template refused a conversation, and got it without its system messages: {error}"
            )
            return text

    def _render(self, history: Sequence[Mapping[str, Any]], opens_answer: bool) -> str:
        template, variables = self.llm.chat_template, {**self._variables, "date": self._date}
        if opens_answer:
            return template.render(history, **variables)
        *before, last = history
        marked = {**last, "content": last["content"] + _END + " "}
        text = template.render([*before, marked], add_generation_prompt=False, **variables)
        if _END not in text:
            raise ChatTemplateError(f"chat template {template.name!r} does not show the answer that is to go on")
        text, _, rest = text.rpartition(_END)
        # Templates that trim what is said would trim this, as transformers has it.
        return text if rest.startswith(" ") else text.rstrip()

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Source of the file's default template, for the harness's records; None if templates are not used.

        Raises:
            ChatTemplateError: there is none, or one of another name was asked for.
        """
        if not chat_template:
            return None
        template = self.llm.chat_template
        if chat_template not in (True, template.name):
            raise ChatTemplateError(f"chat template {chat_template!r}: only {template.name!r} is used here")
        return template.source

    @property
    def tokenizer_name(self) -> str:
        """Name of the chat template and tokenizer, a key of the harness's cache."""
        source = self.llm.chat_template.source
        what = json.dumps([source, self._variables, *([self._date.isoformat()] if _DATED in source else [])])
        return f"{self._name}-{blake2b(what.encode(), digest_size=8).hexdigest()}"

    def get_model_info(self) -> dict[str, Any]:
        """Facts about this run, for the harness's records."""
        return {
            "model_file": self._name,
            "model_fingerprint": model_fingerprint(self.llm.config, self.llm.model.params),
            "max_length": self.llm.max_context,
            "date": self._date.strftime("%Y-%m-%d"),
            "oxjax_version": oxjax.__version__,
            "jax_version": jax.__version__,
        }


def _max_batch(batch_size: int | str | None, most: int | None) -> int:
    if batch_size is None or str(batch_size).startswith("auto"):
        return AUTO_BATCH if most is None else most
    try:
        return int(batch_size)
    except ValueError:
        raise InvalidRequestError(f"batch_size {batch_size!r}: expected a number, 'auto' or 'auto:N'") from None


def _check_device(device: str | None) -> None:
    backend = jax.default_backend()
    if device not in (None, "cuda:0", backend) and (device, backend) != ("cuda", "gpu"):
        raise InvalidRequestError(f"device {device!r}: jax runs on {backend!r}; JAX_PLATFORMS chooses")


def _arguments(request: Instance) -> tuple[Any, Any]:
    """Arguments of a request of two: a context, and a continuation or generation arguments."""
    first, second = cast("tuple[Any, Any]", request.args)
    return first, second


def _either(name: str, value: Any, other_name: str, other: Any) -> Any:
    if value is not None and other is not None:
        raise InvalidRequestError(f"{name} and {other_name} are the same: give one")
    return other if value is None else value


def _texts(value: str | Sequence[str]) -> Sequence[str]:
    return [value] if isinstance(value, str) else value


def _seed(*parts: int | str | None) -> int:
    """Well-mixed 64-bit seed."""
    digest = blake2b(json.dumps(parts).encode(), digest_size=8, person=b"oxjax lm-eval")
    return int.from_bytes(digest.digest(), "little")
