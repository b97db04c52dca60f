"""Shared by commands: options, loading a model, progress bars."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Annotated, Any, TextIO

import typer

ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="GGUF file, folder or hf://org/repo/file.gguf. Default: the embedded model."),
]
DtypeOption = Annotated[str | None, typer.Option(help="float32 or bfloat16.")]
WeightsOption = Annotated[str, typer.Option(help="auto, quantized (as small as the file), float32 or bfloat16.")]
ActivationsOption = Annotated[
    str, typer.Option(help="int8 or float32: type of activations in products with quantised weights.")
]
QuantizeOption = Annotated[str | None, typer.Option(help="q8_0 or q4_0: quantise plain weights while loading.")]
FastOption = Annotated[bool, typer.Option("--fast", help="Faster; bits then depend on the batch.")]
MaxContextOption = Annotated[int | None, typer.Option(help="Maximum number of tokens that the model reads.")]
MaxTokensOption = Annotated[
    int | None,
    typer.Option(
        "--max-tokens", "-n", help="Maximum number of tokens to generate. Default: until the model ends the text."
    ),
]
TemperatureOption = Annotated[float, typer.Option("--temperature", "-t", help="Divides the logits; 0 is greedy.")]
TopKOption = Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")]
TopPOption = Annotated[
    float, typer.Option(help="Keep the most likely tokens with this total probability; 1 keeps all.")
]
MinPOption = Annotated[float, typer.Option(help="Minimum probability relative to the most likely token; 0 keeps all.")]
RepetitionPenaltyOption = Annotated[float, typer.Option(help="Divides the logits of recent tokens; 1 is off.")]
SeedOption = Annotated[int | None, typer.Option(help="Seed of the random draws. Default: from the operating system.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ParamOption = Annotated[
    list[str] | None,
    typer.Option("--param", help="NAME=JSON, any field of SamplingParams: --param top_n_sigma=1.5; repeatable."),
]
PromptArgument = Annotated[str | None, typer.Argument(help="Text; '-' reads standard input.", show_default=False)]


def load(model: str | None, *, fast: bool, **options: Any) -> Any:
    """Load an `LLM`, with a progress bar."""
    from oxjax.llm import LLM

    with progress_bar("loading") as progress:
        return LLM(model, exact=not fast, progress=progress, **options)


def sampling_params(more: list[str] | None, **fields: Any) -> Any:
    """Sampling parameters; `--param` overrides the other options."""
    from oxjax.sampling.params import SamplingParams

    named = dict(map(variable, more or ()))
    if unknown := set(named) - set(SamplingParams.__dataclass_fields__):
        raise typer.BadParameter(f"--param: SamplingParams has no {', '.join(sorted(unknown))}")
    return SamplingParams(**{**fields, **named})


def variable(text: str) -> tuple[str, Any]:
    """Parse `NAME=JSON` to a name and a value."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        raise typer.BadParameter(f"{text}: expected NAME=JSON, for example enable_thinking=false") from None


def read_text(argument: str | None) -> str:
    """The text of an argument; `-` stands for standard input."""
    if argument is None:
        raise typer.BadParameter("give a text, or '-' to read standard input")
    return standard_input().read() if argument == "-" else argument


def standard_input() -> TextIO:
    """Standard input as UTF-8; other bytes become surrogates, which a tokenizer refuses by name."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    return sys.stdin


def _recent() -> Callable[[Any], str]:
    """A function from metrics to a status line, with the speed of the last steps."""
    known: list[Any] = []

    def line(metrics: Any) -> str:
        known.append(metrics)
        del known[:-50]
        return metrics.line(known[0])

    return line


@contextmanager
def status_line() -> Iterator[Callable[[Any], None] | None]:
    """Show a live line of metrics on standard error, if it is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as line:
        recent = _recent()
        yield lambda metrics: line.update(recent(metrics))


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show a progress bar on standard error, if it is a terminal; yields its (done, total) callback."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def batch_bar() -> Iterator[Callable[[Any], None] | None]:
    """Show a progress bar of a batch on standard error, if it is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=None)
        recent = _recent()

        def show(progress: Any) -> None:
            text = f"{progress.failed} errors" if progress.failed else ""
            if progress.metrics is not None:
                text = " · ".join(filter(None, (text, recent(progress.metrics))))
            bar.update(task, completed=progress.done, total=progress.total, description=text)

        yield show
