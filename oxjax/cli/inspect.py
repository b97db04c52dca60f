"""Commands that inspect files: `info` and `tokenize`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from oxjax.cli.options import (
    JsonOption,
    ModelOption,
    PromptArgument,
    read_text,
)


def info(
    file: Annotated[str | None, typer.Argument(help="GGUF file, as for --model.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Describe a model file (architecture, sizes, quantisation, tokenizer, memory) and the software here."""
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


def tokenize(
    text: PromptArgument = None,
    model: ModelOption = None,
    special: Annotated[bool, typer.Option(help="Add BOS and EOS if the file says so.")] = True,
    parse_special: Annotated[bool, typer.Option(help="Parse special tokens such as '<s>' in the text.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Print the tokens of a text."""
    from oxjax.assets import embedded_model
    from oxjax.hub import resolve
    from oxjax.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_gguf(embedded_model() if model is None else resolve(model))
    ids = tokenizer.encode(read_text(text), add_special=special, parse_special=parse_special)
    pieces = [tokenizer.token_bytes(i).decode("utf-8", "backslashreplace") for i in ids]
    if as_json:
        print(json.dumps({"token_ids": ids, "pieces": pieces}, ensure_ascii=False))
    else:
        for token, piece in zip(ids, pieces, strict=True):
            print(f"{token:>7}  {piece!r}")
