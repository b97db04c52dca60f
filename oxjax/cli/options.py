"""Shared by commands: options, loading a model, progress bars."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from io import TextIOWrapper
from typing import Annotated, Any, TextIO

import typer

ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="GGUF file, folder or hf://org/repo/file.gguf. Default: the embedded model."),
]
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


_LOAD_OPTIONS = {
    "model": (ModelOption, None),
    "max_context": (
        Annotated[int | None, typer.Option(help="Maximum number of tokens of a prompt and its output together.")],
        None,
    ),
    "dtype": (Annotated[str | None, typer.Option(help="float32 or bfloat16, of activations.")], None),
    "weights": (
        Annotated[str, typer.Option(help="auto, file (as small as the file), float32, bfloat16, q8_0 or q4_0.")],
        "auto",
    ),
    "activations": (
        Annotated[str, typer.Option(help="int8 or float32: type of activations in products with quantised weights.")],
        "int8",
    ),
    "backend": (Annotated[str, typer.Option(help="auto, native (kernels in C++) or xla.")], "auto"),
    "fast": (Annotated[bool, typer.Option("--fast", help="Faster; bits then depend on the batch.")], False),
    "threads": (Annotated[int | None, typer.Option(help="Number of processor threads. Default: all.")], None),
    "quantize": (Annotated[str | None, typer.Option(hidden=True)], None),
}


@dataclass(frozen=True)
class ModelLoader:
    """Loads the `LLM` that a command's options describe, with a progress bar."""

    options: dict[str, Any]

    @property
    def is_default(self) -> bool:
        """No model was named, so it is the embedded one."""
        return self.options["model"] is None

    def __call__(self, **more: Any) -> Any:
        """The `LLM`; `more` are further keywords of it."""
        from oxjax.llm import LLM

        options = dict(self.options)
        fast, quantize = options.pop("fast"), options.pop("quantize")
        if quantize is not None:
            raise typer.BadParameter(f"--quantize {quantize} is now --weights {quantize}")
        with progress_bar("loading") as progress:
            return LLM(exact=not fast, progress=progress, **options, **more)


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that a model is loaded with to a command, which gets them as its argument `load`."""

    @wraps(command)
    def wrapper(**given: Any) -> None:
        options = {name: given.pop(name) for name in _LOAD_OPTIONS}
        command(**given, load=ModelLoader(options))

    own = inspect.signature(command, eval_str=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [p.replace(kind=kind) for p in own.parameters.values() if p.name != "load"]
    parameters += [
        inspect.Parameter(name, kind, default=default, annotation=annotation)
        for name, (annotation, default) in _LOAD_OPTIONS.items()
    ]
    vars(wrapper)["__signature__"] = own.replace(parameters=parameters)
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


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
