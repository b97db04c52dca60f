"""The `oxjax` command. Imports the engine only in the commands that run a model."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from oxjax.errors import OxjaxError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Reproducible inference of GGUF models on JAX.")

ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="GGUF file, folder or hf://org/repo/file.gguf. Default: the embedded model."),
]
DtypeOption = Annotated[str | None, typer.Option(help="float32 or bfloat16.")]
WeightsOption = Annotated[str, typer.Option(help="auto, quantized (as small as the file), float32 or bfloat16.")]
ActivationsOption = Annotated[str, typer.Option(help="int8 or float32: what multiplies quantised weights.")]
QuantizeOption = Annotated[str | None, typer.Option(help="q8_0 or q4_0: quantise plain weights while loading.")]
FastOption = Annotated[bool, typer.Option("--fast", help="Give up bit-exactness across batches for speed.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ParamOption = Annotated[
    list[str] | None,
    typer.Option("--param", help="NAME=JSON, any other field of SamplingParams: --param top_n_sigma=1.5; repeatable."),
]
PromptArgument = Annotated[str | None, typer.Argument(help="Text; '-' reads standard input.", show_default=False)]

_DEMO_PROMPT = "Once upon a time"
_LINES = 64  # of standard input that are embedded together


def main() -> None:
    """Run the command line; errors of oxjax become one line on standard error and exit code 1."""
    try:
        app()
    except OxjaxError as error:
        print(f"oxjax: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        sys.stderr.close()
        sys.exit(0)


@app.command()
def generate(
    prompt: PromptArgument = None,
    model: ModelOption = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", "-n", help="Default: to the end.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 keeps all.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0 keeps all.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Divides logits of recent tokens; 1 is off.")] = 1.0,
    frequency_penalty: Annotated[float, typer.Option(help="Subtracted per occurrence.")] = 0.0,
    presence_penalty: Annotated[float, typer.Option(help="Subtracted once.")] = 0.0,
    penalty_window: Annotated[int, typer.Option(help="How many last tokens are penalised; -1 is all.")] = 64,
    seed: Annotated[int | None, typer.Option(help="Default: from the operating system.")] = None,
    logprobs: Annotated[int, typer.Option(help="Report this many likely tokens at each step (with --json).")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    stop_token: Annotated[list[int] | None, typer.Option(help="End at this token id; may be repeated.")] = None,
    ban: Annotated[list[int] | None, typer.Option(help="Never choose this token id; may be repeated.")] = None,
    bias: Annotated[list[str] | None, typer.Option(help="ID=NUMBER, added to a logit; may be repeated.")] = None,
    min_tokens: Annotated[int, typer.Option(help="Do not end before so many.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after end-of-text tokens.")] = False,
    samples: Annotated[int, typer.Option("--samples", help="Draw this many, each with a seed of its own.")] = 1,
    param: ParamOption = None,
    grammar: Annotated[Path | None, typer.Option(help="GBNF file: the language of the output.")] = None,
    json_schema: Annotated[Path | None, typer.Option(help="File with the JSON schema of the output.")] = None,
    regex: Annotated[str | None, typer.Option(help="Expression that the whole output matches.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="One of the texts to choose from; repeatable.")] = None,
    beams: Annotated[int, typer.Option(help="Search for this many most likely texts, at temperature 0.")] = 0,
    max_context: Annotated[int | None, typer.Option(help="Most tokens, prompt included.")] = None,
    dtype: DtypeOption = None,
    weights: WeightsOption = "auto",
    activations: ActivationsOption = "int8",
    quantize: QuantizeOption = None,
    fast: FastOption = False,
    as_json: JsonOption = False,
) -> None:
    """Continue a text."""
    params = _params(
        param,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        logprobs=logprobs,
        stop=tuple(stop or ()),
        stop_token_ids=tuple(stop_token or ()),
        banned_tokens=tuple(ban or ()),
        logit_bias=tuple(map(_bias, bias or ())),
        min_tokens=min_tokens,
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        penalty_window=None if penalty_window == -1 else penalty_window,
        ignore_eos=ignore_eos,
        n=samples,
        grammar=_grammar(grammar, json_schema, regex, choice),
    )
    text = _DEMO_PROMPT if prompt is None and model is None else _text(prompt)
    llm = _load(
        model,
        dtype=dtype,
        weights=weights,
        activations=activations,
        quantize=quantize,
        fast=fast,
        max_batch=min(max(samples, beams), 8),
        max_context=max_context,
    )
    with llm:
        if beams:
            _search(llm, text, params, beams, as_json=as_json)
            return
        if not as_json and samples == 1:
            _stream(llm, text, params)
            return
        with _status() as status:
            (result,) = llm.generate(text, params, progress=status)
        if as_json:
            print(json.dumps({"prompt": text, **asdict(result)}, ensure_ascii=False))
        else:
            print("\n\n".join(f"[seed {r.seed}]\n{text}{r.text}" for r in (result, *result.others)))


def _params(more: list[str] | None, **fields: Any) -> Any:
    """Sampling parameters; those that `--param` names are as it says."""
    from oxjax.sampling.params import SamplingParams

    named = dict(map(_variable, more or ()))
    if unknown := set(named) - set(SamplingParams.__dataclass_fields__):
        raise typer.BadParameter(f"--param: SamplingParams has no {', '.join(sorted(unknown))}")
    return SamplingParams(**{**fields, **named})


def _grammar(gbnf: Path | None, schema: Path | None, regex: str | None, choice: list[str] | None) -> Any:
    from oxjax.constrain import Grammar

    given = [(Grammar.gbnf, gbnf), (Grammar.json_schema, schema), (Grammar.regex, regex), (Grammar.choice, choice)]
    given = [(make, source) for make, source in given if source]
    if len(given) > 1:
        raise typer.BadParameter("one of --grammar, --json-schema, --regex and --choice")
    return next((make(s.read_text("utf-8") if isinstance(s, Path) else s) for make, s in given), None)


def _search(llm: Any, text: str, params: Any, width: int, *, as_json: bool) -> None:
    """Print what a beam search finds."""
    from oxjax.engine.beams import BeamParams

    (found,) = llm.beam_search(text, BeamParams(width=width), replace(params, temperature=0.0))
    if as_json:
        print(json.dumps({"prompt": text, "results": [asdict(r) for r in found]}, ensure_ascii=False))
    else:
        print("\n\n".join(f"[score {r.score:.4f}]\n{text}{r.text}" for r in found))


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise typer.BadParameter(f"--bias {text}: expected ID=NUMBER") from None


def _stream(llm: Any, text: str, params: Any) -> None:
    """Print prompt and continuation as they come."""
    with _progress("reading the prompt") as progress:
        chunks = llm.stream(text, params, progress=progress)
        first = next(chunks)
    sys.stdout.write(text + first.text)
    for chunk in chunks:
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command()
def chat(
    message: Annotated[
        str | None,
        typer.Argument(
            help="One message; '-' reads standard input. Default: ask for one after another.", show_default=False
        ),
    ] = None,
    model: ModelOption = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="What the system message says.")] = None,
    template: Annotated[Path | None, typer.Option(help="Jinja file to use instead of the model's template.")] = None,
    variable: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=JSON, for the template; repeatable.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", "-n", help="Default: to the end.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 keeps all.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0 keeps all.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Divides logits of recent tokens; 1 is off.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Default: from the operating system.")] = None,
    param: ParamOption = None,
    max_context: Annotated[int | None, typer.Option(help="Most tokens, the whole conversation included.")] = None,
    dtype: DtypeOption = None,
    weights: WeightsOption = "auto",
    activations: ActivationsOption = "int8",
    quantize: QuantizeOption = None,
    fast: FastOption = False,
    as_json: JsonOption = False,
) -> None:
    """Talk with a model that has a chat template. Answers are printed; reasoning goes to standard error."""
    params = _params(
        param,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    variables: dict[str, Any] = dict(map(_variable, variable or ()))
    if as_json and message is None:
        raise typer.BadParameter("--json prints one answer: give a message")
    if template is not None:
        variables["template"] = template.read_text("utf-8")
    llm = _load(
        model,
        dtype=dtype,
        weights=weights,
        activations=activations,
        quantize=quantize,
        fast=fast,
        max_batch=1,
        max_context=max_context,
    )
    messages = [] if system is None else [{"role": "system", "content": system}]
    with llm:
        for text in _asked() if message is None else [_text(message)]:
            messages.append({"role": "user", "content": text})
            for delta in llm.stream_chat(messages, params, **variables):
                if not as_json:
                    print(delta.reasoning, end="", flush=True, file=sys.stderr)
                    print(delta.content, end="", flush=True)
            result = delta.result
            messages = result.messages
            print(json.dumps(asdict(result), ensure_ascii=False) if as_json else "")


def _variable(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        raise typer.BadParameter(f"{text}: expected NAME=JSON, for example enable_thinking=false") from None


def _asked() -> Iterator[str]:
    """Lines of standard input, asked for where that is a terminal."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True, file=sys.stderr)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


@app.command()
def embed(
    text: PromptArgument = None,
    model: ModelOption = None,
    pooling: Annotated[str | None, typer.Option(help="mean, max, cls, last or none. Default: the file's.")] = None,
    normalize: Annotated[bool, typer.Option(help="Divide every vector by its length.")] = True,
    truncate: Annotated[
        int | None, typer.Option(help="Keep this many tokens of longer texts. Default: refuse.")
    ] = None,
    dtype: DtypeOption = None,
    weights: WeightsOption = "auto",
    activations: ActivationsOption = "int8",
    quantize: QuantizeOption = None,
    fast: FastOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per text.")] = False,
) -> None:
    """Print the embedding of a text, or of each line of standard input ('-')."""
    texts = (line.rstrip("\n") for line in sys.stdin) if text == "-" else iter([_text(text)])
    llm = _load(
        model,
        dtype=dtype,
        weights=weights,
        activations=activations,
        quantize=quantize,
        fast=fast,
    )
    with llm:
        while block := list(islice(texts, _LINES)):
            for line, vectors in zip(block, llm.embed(block, pooling, normalize, truncate=truncate), strict=True):
                if as_json:
                    print(json.dumps({"text": line, "embedding": vectors.tolist()}, ensure_ascii=False))
                else:
                    for vector in vectors.reshape(-1, vectors.shape[-1]):
                        print(" ".join(f"{x:.8g}" for x in vector))


@app.command()
def info(
    file: Annotated[str | None, typer.Argument(help="As for --model.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Describe a model file: architecture, sizes, quantisation, tokenizer, template, memory."""
    from oxjax.assets import embedded_model
    from oxjax.hub import resolve
    from oxjax.info import describe

    facts = describe(embedded_model() if file is None else resolve(file))
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, inner in value.items():
                print(f"  {key:<24}{_shown(inner)}")
        else:
            print(f"{name:<26}{_shown(value)}")


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


@app.command()
def tokenize(
    text: PromptArgument = None,
    model: ModelOption = None,
    special: Annotated[bool, typer.Option(help="Add BOS and EOS as the file says.")] = True,
    parse_special: Annotated[bool, typer.Option(help="Read '<s>' and the like as special tokens.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Show the tokens of a text."""
    from oxjax.assets import embedded_model
    from oxjax.hub import resolve
    from oxjax.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_gguf(embedded_model() if model is None else resolve(model))
    ids = tokenizer.encode(_text(text), add_special=special, parse_special=parse_special)
    pieces = [tokenizer.token_bytes(i).decode("utf-8", "backslashreplace") for i in ids]
    if as_json:
        print(json.dumps({"token_ids": ids, "pieces": pieces}, ensure_ascii=False))
    else:
        for token, piece in zip(ids, pieces, strict=True):
            print(f"{token:>7}  {piece!r}")


@app.command("lm-eval", context_settings={"ignore_unknown_options": True}, add_help_option=False)
def lm_eval(
    arguments: Annotated[list[str] | None, typer.Argument(help="The harness's own; --help shows them.")] = None,
) -> None:
    """Run lm-evaluation-harness, which then knows `--model oxjax`."""
    if importlib.util.find_spec("lm_eval") is None:
        raise OxjaxError("lm-evaluation-harness is not installed: pip install 'oxjax[lm-eval]'")
    from lm_eval.__main__ import cli_evaluate

    import oxjax.evaluate.harness  # noqa: F401  (registers the model)

    sys.argv = ["oxjax lm-eval", *(arguments or ())]
    cli_evaluate()


def _load(model: str | None, *, fast: bool, **options: Any) -> Any:
    """An `LLM`, with a bar while it loads."""
    from oxjax.llm import LLM

    with _progress("loading") as progress:
        return LLM(model, exact=not fast, progress=progress, **options)


def _text(argument: str | None) -> str:
    if argument is None:
        raise typer.BadParameter("give a text, or '-' to read standard input")
    return sys.stdin.read() if argument == "-" else argument


@contextmanager
def _status() -> Iterator[Callable[[Any], None] | None]:
    """One live line of metrics on standard error; none where that is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as line:
        known: list[Any] = []

        def show(metrics: Any) -> None:
            known.append(metrics)
            del known[:-50]  # speed over the last steps
            line.update(metrics.line(known[0]))

        yield show


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on standard error while a (done, total) callback is called; none where that is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
