"""Chat templates: a conversation to the text that the model was trained to continue.

The meaning is that of Hugging Face's `apply_chat_template` (transformers, utils/chat_template_utils.py): the same
Jinja settings, filters, globals and variables. Templates come with downloaded files, so they run in `sandbox`.
"""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateSyntaxError

from oxjax.errors import ChatTemplateError

from .meter import METER, Meter
from .sandbox import Sandbox

KEY = "tokenizer.chat_template"
NAMES_KEY = "tokenizer.chat_templates"
MAX_SOURCE = 1 << 17
_FILE = "<template>"  # what jinja2 calls a template made from a string, in tracebacks


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja text.
        bos_token, eos_token: texts of these tokens; templates put them where they belong.
        name: what errors call it.
        tool_use: the template to use instead when a conversation comes with tools.

    Raises:
        ChatTemplateError: the source is not valid Jinja; the message has the line.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str = "",
        eos_token: str = "",
        name: str = "default",
        tool_use: ChatTemplate | None = None,
    ):
        self.source, self.name, self.tool_use = source, name, tool_use
        self.bos_token, self.eos_token = bos_token, eos_token
        if len(source) > MAX_SOURCE:
            raise ChatTemplateError(f"chat template {name!r} has {len(source)} characters, at most {MAX_SOURCE} run")
        environment = Sandbox()
        environment.add_filter("tojson", _tojson)
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ChatTemplateError(f"chat template {name!r}, line {error.lineno}: {error.message}") from error
        except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
            # What the Python compiler says of expressions nested or written too large.
            raise ChatTemplateError(f"chat template {name!r} cannot be compiled: {error!r}") from error

    @classmethod
    def from_metadata(
        cls,
        metadata: Mapping[str, Any],
        *,
        name: str | None = None,
        bos_token: str = "",
        eos_token: str = "",
    ) -> ChatTemplate:
        """The template of a GGUF file (keys `tokenizer.chat_template` and `tokenizer.chat_template.<name>`).

        Args:
            metadata: the file's metadata.
            name: one of the file's named templates; None takes the default one, and `tool_use`, if the file has
                it, for conversations with tools.
            bos_token, eos_token: texts of these tokens.

        Raises:
            ChatTemplateError: the file has no such template; the message lists those it has.
        """
        found = {n: metadata.get(f"{KEY}.{n}") for n in metadata.get(NAMES_KEY, ())}
        found |= {k[len(KEY) + 1 :]: v for k, v in metadata.items() if k.startswith(KEY + ".")}
        if metadata.get(KEY) is not None:
            found["default"] = metadata[KEY]
        sources = {n: source for n, source in found.items() if isinstance(source, str)}
        wanted = "default" if name is None else name
        if wanted not in sources:
            has = ", ".join(repr(n) for n in sorted(sources)) or "none"
            raise ChatTemplateError(
                f"the file has no chat template {wanted!r} ({KEY}); it has: {has}. Pass one of these as `name`, or "
                "build a ChatTemplate from the model's own Jinja text"
            )
        tools = None
        if name is None and "tool_use" in sources:
            tools = cls(sources["tool_use"], name="tool_use", bos_token=bos_token, eos_token=eos_token)
        return cls(sources[wanted], name=wanted, tool_use=tools, bos_token=bos_token, eos_token=eos_token)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        date: datetime | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt text of a conversation.

        Args:
            messages: dicts with at least `role` and `content`; they are never changed.
            tools: JSON schemas of the functions that the model may call.
            documents: texts to answer from, for templates that know them.
            add_generation_prompt: end with the opening of the assistant's turn.
            date: what `strftime_now` shows; None is now. Give one for a prompt that is the same tomorrow.
            kwargs: further variables of the template, `enable_thinking` for example.

        Raises:
            ChatTemplateError: the template refused the conversation (its own message is quoted), met something it
                did not expect, reached for what it may not have, or used more time or memory than a prompt needs.
        """
        if tools and self.tool_use is not None:
            return self.tool_use.render(
                messages,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                date=date,
                **kwargs,
            )
        variables = {
            "messages": messages,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "strftime_now": _Clock(date),
            **kwargs,
        }
        try:
            token = METER.set(Meter(variables))
        except RecursionError as error:
            raise ChatTemplateError("the conversation contains itself") from error
        try:
            return self._template.render(variables)
        except Exception as error:  # a template can raise anything: a KeyError, a TypeError, jinja2's own
            raise ChatTemplateError(self._explain(error)) from error
        finally:
            METER.reset(token)

    def _explain(self, error: Exception) -> str:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == _FILE]
        where = f"chat template {self.name!r}" + (f", line {lines[-1]}" if lines else "")
        kind = "" if isinstance(error, ChatTemplateError) else f"{type(error).__name__}: "
        return f"{where}: {kind}{error}"[:1000]


class _Clock:
    """`strftime_now(format)` of one render."""

    def __init__(self, date: datetime | None):
        self.date = date

    def __call__(self, format: str) -> str:
        if len(format) > 200 or re.search(r"%[^a-zA-Z%]*\d", format):
            raise ChatTemplateError(f"strftime_now({format[:40]!r}...) has too long a format, or a width")
        return (self.date or datetime.now()).strftime(format)


def _raise_exception(message: Any) -> None:
    raise ChatTemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Hugging Face's `tojson`: no HTML escapes, no ASCII escapes, keys in their order."""
    meter = METER.get()
    weight, depth = meter.weigh(value)
    margin = len(indent) if isinstance(indent, str) else indent or 0
    meter.check(weight // 8 * (margin * (depth + 1) + sum(map(len, separators or ()))))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
