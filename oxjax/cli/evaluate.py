"""Commands that evaluate: `score`, `embed`, `batch`, `verify` and `lm-eval`."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from oxjax.cli.options import (
    JsonOption,
    ModelLoader,
    PromptArgument,
    batch_bar,
    model_options,
    read_text,
    standard_input,
)
from oxjax.errors import OxjaxError, RequestError, RequestTooLargeError

_LINES = 64  # of standard input that are embedded together


@model_options
def score(
    text: PromptArgument = None,
    continuations: Annotated[
        list[str] | None, typer.Argument(help="Texts to score after the first one.", show_default=False)
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Number of tokens that each window after the first scores.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Number of tokens in a window.")] = None,
    as_json: JsonOption = False,
    *,
    load: ModelLoader,
) -> None:
    """Print log-likelihoods of continuations of a text or, without continuations, the perplexity of the text."""
    if continuations and (stride is not None or window is not None):
        raise typer.BadParameter("--stride and --window are for the perplexity of one text")
    context = read_text(text)
    with load() as llm:
        if continuations:
            scores = llm.score([(context, continuation) for continuation in continuations])
            if as_json:
                print(json.dumps({"context": context, "scores": [asdict(s) for s in scores]}, ensure_ascii=False))
                return
            for continuation, found in zip(continuations, scores, strict=True):
                print(f"{found.logprob:12.4f}  {'greedy' if found.is_greedy else '      '}  {continuation!r}")
            return
        found = llm.perplexity(context, stride, window=window)
        if as_json:
            print(json.dumps(asdict(found), ensure_ascii=False))
            return
        for name in ("perplexity", "bits_per_byte", "logprob"):
            print(f"{name:<14}{getattr(found, name):.6g}")
        print(f"{'tokens':<14}{len(found.token_ids)}")


@model_options
def embed(
    text: PromptArgument = None,
    pooling: Annotated[str | None, typer.Option(help="mean, max, cls, last or none. Default: the file's.")] = None,
    normalize: Annotated[bool, typer.Option(help="Scale every vector to length one.")] = True,
    truncate: Annotated[
        int | None, typer.Option(help="Cut texts to this many tokens. Default: too long a text is an error.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per text.")] = False,
    *,
    load: ModelLoader,
) -> None:
    """Print the embedding of a text, or of each line of standard input ('-')."""
    texts = (line.rstrip("\n") for line in standard_input()) if text == "-" else iter([read_text(text)])
    llm = load()
    with llm:
        n_done = 0
        while block := list(islice(texts, _LINES)):
            try:
                found, error = llm.embed(block, pooling, normalize, truncate=truncate), None
            except RequestError as refused:
                if refused.index is None:
                    raise
                found, error = refused.results[: refused.index], refused
            for line, vectors in zip(block, found, strict=False):
                if as_json:
                    print(json.dumps({"text": line, "embedding": vectors.tolist()}, ensure_ascii=False))
                else:
                    for vector in vectors.reshape(-1, vectors.shape[-1]):
                        print(" ".join(f"{x:.8g}" for x in vector))
            n_done += len(found)
            if error is not None:
                advice = "; --truncate shortens texts" if isinstance(error, RequestTooLargeError) else ""
                raise OxjaxError(f"text {n_done + 1}: {error}{advice}") from error


@model_options
def batch(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Requests: JSON lines.", exists=True)],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Results: JSON lines.")],
    seed: Annotated[
        int, typer.Option(help="Seed of requests without one; each gets a seed derived from it and its id.")
    ] = 0,
    date: Annotated[
        str | None, typer.Option(help="YYYY-MM-DD, the date that chat templates are given. Default: today.")
    ] = None,
    shard: Annotated[str, typer.Option(help="i/n: run the i-th of n parts of the requests.")] = "1/1",
    on_error: Annotated[
        str, typer.Option(help="continue writes errors as results; stop ends the run at the first bad line.")
    ] = "continue",
    max_batch: Annotated[int, typer.Option(help="Number of requests that run at once.")] = 32,
    *,
    load: ModelLoader,
) -> None:
    """Run a file of requests. After an interrupt or a crash, the same command resumes.

    Lines are in the format of OpenAI's batch API or a shorter one; see docs/offline-evaluation.md.
    """
    from oxjax.evaluate import run

    part = _shard(shard)
    if not output.absolute().parent.is_dir():
        raise typer.BadParameter(f"{output}: there is no folder {output.parent}")
    with (
        load(
            max_batch=max_batch,
        ) as llm,
        batch_bar() as progress,
    ):
        summary = run(
            llm,
            source,
            output,
            seed=seed,
            date=date,
            shard=part,
            on_error=on_error,
            progress=progress,
        )
    print(
        f"{summary.done} of {summary.total} requests done, {summary.failed} of them with errors; "
        f"{summary.found} were there before, the others took {summary.seconds:.1f} s",
        file=sys.stderr,
    )
    if not summary.complete:
        print("interrupted: run the same command to resume", file=sys.stderr)
        raise typer.Exit(130)


def _shard(text: str) -> tuple[int, int]:
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal()):
        raise typer.BadParameter(f"--shard {text}: expected i/n, 1/4 for example")
    return int(i), int(n)


def verify(
    manifest: Annotated[Path, typer.Argument(help="OUT.manifest.json, beside the results.", show_default=False)],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Path of the model, if it has moved.")] = None,
    sample: Annotated[int, typer.Option(min=0, help="Number of results to recompute; 0 is all.")] = 100,
) -> None:
    """Recompute a sample of the results of a batch and compare their bits."""
    from oxjax.evaluate import verify as check

    found = check(manifest, model=model, sample=sample or None)
    for line in found.changed:
        print(f"changed since the results were made: {line}", file=sys.stderr)
    same = found.n_checked - len(found.differing)
    print(f"{same} of {found.n_checked} results are the same to the bit; the file has {found.n_results}")
    if found.differing:
        raise OxjaxError(f"results differ for the lines {', '.join(map(str, found.differing))} of the input")


def lm_eval(
    arguments: Annotated[list[str] | None, typer.Argument(help="Arguments of the harness; --help lists them.")] = None,
) -> None:
    """Run lm-evaluation-harness with oxjax as a model: `--model oxjax`."""
    if importlib.util.find_spec("lm_eval") is None:
        raise OxjaxError("lm-evaluation-harness is not installed: pip install 'oxjax[lm-eval]'")
    import oxjax.evaluate.harness  # noqa: F401  (registers the model)

    sys.argv = ["oxjax lm-eval", *(arguments or ())]
    importlib.import_module("lm_eval.__main__").cli_evaluate()
