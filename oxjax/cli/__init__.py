"""The `oxjax` command. Imports the engine only in the commands that run a model."""

from __future__ import annotations

import sys

import typer

from oxjax.cli.evaluate import batch, embed, lm_eval, score, verify
from oxjax.cli.generate import chat, generate
from oxjax.cli.inspect import info, tokenize
from oxjax.errors import OxjaxError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Reproducible inference of GGUF models on JAX.")
for command in (generate, chat, score, embed, batch, verify, info, tokenize):
    app.command()(command)
# Its options are the harness's own.
app.command("lm-eval", context_settings={"ignore_unknown_options": True}, add_help_option=False)(lm_eval)


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
