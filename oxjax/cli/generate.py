"""Commands that generate: `generate` and `chat`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from oxjax.cli.options import (
    JsonOption,
    MaxTokensOption,
    MinPOption,
    ModelLoader,
    ParamOption,
    PromptArgument,
    RepetitionPenaltyOption,
    SeedOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    model_options,
    progress_bar,
    read_text,
    sampling_params,
    status_line,
    variable,
)

_DEMO_PROMPT = "Once upon a time"


@model_options
def generate(
    prompt: PromptArgument = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = 1.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    frequency_penalty: Annotated[float, typer.Option(help="Subtracted from a logit per recent occurrence.")] = 0.0,
    presence_penalty: Annotated[float, typer.Option(help="Subtracted once from the logit of a recent token.")] = 0.0,
    penalty_window: Annotated[
        int, typer.Option(help="Number of recent tokens that the penalties count; -1 is all.")
    ] = 64,
    seed: SeedOption = None,
    logprobs: Annotated[int, typer.Option(help="Number of most likely tokens to report per step (with --json).")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; repeatable.")] = None,
    stop_token: Annotated[list[int] | None, typer.Option(help="Stop at this token id; repeatable.")] = None,
    ban: Annotated[list[int] | None, typer.Option(help="Never generate this token id; repeatable.")] = None,
    bias: Annotated[
        list[str] | None, typer.Option(help="ID=NUMBER, added to the logit of a token; repeatable.")
    ] = None,
    min_tokens: Annotated[int, typer.Option(help="Minimum number of tokens to generate.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Continue after end-of-text tokens.")] = False,
    samples: Annotated[int, typer.Option("--samples", help="Number of samples, each with its own seed.")] = 1,
    param: ParamOption = None,
    grammar: Annotated[Path | None, typer.Option(help="File with a GBNF grammar for the output.")] = None,
    json_schema: Annotated[Path | None, typer.Option(help="File with a JSON schema for the output.")] = None,
    regex: Annotated[str | None, typer.Option(help="Regular expression that the whole output matches.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="A text that the output may be; repeatable.")] = None,
    beams: Annotated[int, typer.Option(help="Beam search with this width, at temperature 0.")] = 0,
    as_json: JsonOption = False,
    *,
    load: ModelLoader,
) -> None:
    """Continue a text."""
    params = sampling_params(
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
    text = _DEMO_PROMPT if prompt is None and load.is_default else read_text(prompt)
    llm = load(
        max_batch=min(max(samples, beams), 8),
    )
    with llm:
        if beams:
            _search(llm, text, params, beams, as_json=as_json)
            return
        if not as_json and samples == 1:
            _stream(llm, text, params)
            return
        with status_line() as status:
            (result,) = llm.generate(text, params, progress=status)
        if as_json:
            print(json.dumps({"prompt": text, **asdict(result)}, ensure_ascii=False))
        else:
            print("\n\n".join(f"[seed {r.seed}]\n{text}{r.text}" for r in (result, *result.others)))


def _grammar(gbnf: Path | None, schema: Path | None, regex: str | None, choice: list[str] | None) -> Any:
    from oxjax.constrain import Grammar

    given = [(Grammar.gbnf, gbnf), (Grammar.json_schema, schema), (Grammar.regex, regex), (Grammar.choice, choice)]
    given = [(make, source) for make, source in given if source]
    if len(given) > 1:
        raise typer.BadParameter("give only one of --grammar, --json-schema, --regex and --choice")
    return next((make(s.read_text("utf-8") if isinstance(s, Path) else s) for make, s in given), None)


def _search(llm: Any, text: str, params: Any, width: int, *, as_json: bool) -> None:
    """Print the results of a beam search."""
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
    """Print the prompt, and the continuation as it is generated."""
    with progress_bar("reading the prompt") as progress:
        chunks = llm.stream(text, params, progress=progress)
        first = next(chunks)
    sys.stdout.write(text + first.text)
    for chunk in chunks:
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
    sys.stdout.write("\n")


@model_options
def chat(
    message: Annotated[
        str | None,
        typer.Argument(help="One message; '-' reads standard input. Default: a conversation.", show_default=False),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="Text of the system message.")] = None,
    template: Annotated[
        Path | None, typer.Option(help="File with a Jinja template to use in place of the model's.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=JSON, a variable of the template; repeatable.")
    ] = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = 1.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    seed: SeedOption = None,
    param: ParamOption = None,
    as_json: JsonOption = False,
    *,
    load: ModelLoader,
) -> None:
    """Chat with a model that has a chat template. Reasoning is printed to standard error."""
    params = sampling_params(
        param,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    variables: dict[str, Any] = dict(map(variable, settings or ()))
    if as_json and message is None:
        raise typer.BadParameter("--json prints one answer: give a message")
    if template is not None:
        variables["template"] = template.read_text("utf-8")
    llm = load(
        max_batch=1,
    )
    messages = [] if system is None else [{"role": "system", "content": system}]
    with llm:
        for text in _asked() if message is None else [read_text(message)]:
            messages.append({"role": "user", "content": text})
            for delta in llm.stream_chat(messages, params, **variables):
                if not as_json:
                    print(delta.reasoning, end="", flush=True, file=sys.stderr)
                    print(delta.content, end="", flush=True)
            result = delta.result
            messages = result.messages
            print(json.dumps(asdict(result), ensure_ascii=False) if as_json else "")


def _asked() -> Iterator[str]:
    """Lines of standard input, with a prompt if it is a terminal."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True, file=sys.stderr)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")
