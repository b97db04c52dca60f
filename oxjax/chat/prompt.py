"""Prompts of conversations: rendering and encoding with one BOS, and only the template's own special tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from oxjax.chat.tool_format import Dialect
from oxjax.errors import ChatTemplateError
from oxjax.gguf import GGUFFile
from oxjax.tokenizer import Tokenizer
from oxjax.tokenizer.chat import ChatTemplate
from oxjax.tokenizer.guard import Guard

_VALUES = ("first_value", "second_value")
_FIXED = ("role", "type", "id", "tool_call_id")  # fields of messages that programs write


@dataclass(frozen=True)
class Shape:
    """Form in which a template expects messages with calls.

    Attributes:
        one_call: it renders only one call of a message.
        text_arguments: it expects arguments as JSON text.
        content: value for a message with calls and no answer.
    """

    one_call: bool
    text_arguments: bool
    content: str | None


class TemplateTokens(TypedDict):
    """Texts of the tokens that chat templates refer to, as arguments of `ChatTemplate`."""

    bos_token: str
    eos_token: str


def template_tokens(tokenizer: Tokenizer) -> TemplateTokens:
    """Texts of BOS and EOS; empty if the tokenizer has no such token."""

    def text(i: int | None) -> str:
        return "" if i is None else tokenizer.token_text(i)

    return {"bos_token": text(tokenizer.bos_id), "eos_token": text(tokenizer.eos_id)}


def read_template(path: str | Path, tokenizer: Tokenizer) -> ChatTemplate:
    """Read the chat template of a GGUF file.

    Args:
        path: the file.
        tokenizer: the file's.

    Raises:
        ChatTemplateError: the file has no template, or it is malformed.
    """
    with GGUFFile.open(Path(path)) as file:
        return ChatTemplate.from_metadata(file.metadata, **template_tokens(tokenizer))


class Prompter:
    """Renders conversations with a template and encodes them.

    Only the template writes special tokens. If a message or the description of a tool spells one, it is encoded as
    ordinary text, so that no message can end a turn or begin another. Tokens
    that the file calls user-defined, not control, are not protected: any text may contain them.

    Args:
        template: the model's.
        tokenizer: the model's.
        dialect: format of calls and reasoning.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, dialect: Dialect):
        self.template, self.tokenizer, self.dialect = template, tokenizer, dialect
        tags = {tag for pair in dialect.reasoning for tag in pair}  # templates look for these in old messages
        self._guard = Guard(tokenizer, allowed=tags)
        self._shape: Shape | None = None

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], **variables: Any
    ) -> tuple[list[int], str]:
        """Render a conversation; returns ids and text of the prompt.

        Args:
            messages, tools: see `ChatTemplate.render`; arguments of calls are dicts.
            variables: of the template.

        Raises:
            ChatTemplateError: the template rejected the conversation, or cannot render its calls.
        """
        if any(m.get("tool_calls") for m in messages):
            messages = _shaped(messages, self.shape(tools, **variables))
        if self.dialect.harmony:
            messages = [_with_thinking(m) for m in messages]
        messages = [{k: v if k in _FIXED else self._guarded(v) for k, v in m.items()} for m in messages]
        text = self.template.render(messages, tools=self._guarded(list(tools)) or None, **variables)
        ids = self._guard.encode(text)
        bos = self.tokenizer.bos_id
        if self.tokenizer.add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids, self._guard.plain(text)

    def shape(self, tools: Sequence[Mapping[str, Any]], **variables: Any) -> Shape:
        """Form in which the template expects messages with calls; probed once, with a small conversation.

        Args:
            tools, variables: see `prompt`.

        Raises:
            ChatTemplateError: it renders calls in no shape.
        """
        self._shape = self._shape or self._find_shape(tools, variables)
        return self._shape

    def _guarded(self, value: Any) -> Any:
        """Value with a guard in every special token that its texts spell."""
        if isinstance(value, str):
            return self._guard.protect(value)
        if isinstance(value, Mapping):
            return {self._guarded(k): v if k in _FIXED else self._guarded(v) for k, v in value.items()}
        return [self._guarded(v) for v in value] if isinstance(value, (list, tuple)) else value

    def _find_shape(self, tools: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> Shape:
        """Find the first shape in which the template renders calls."""
        problem: ChatTemplateError | None = None
        for shape in (Shape(o, t, c) for o in (False, True) for t in (False, True) for c in ("", None)):
            values = _VALUES[:1] if shape.one_call else _VALUES
            calls = [
                {"id": f"call0000{i}", "type": "function", "function": {"name": "probe", "arguments": {"key": value}}}
                for i, value in enumerate(values)
            ]
            probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": calls}]
            try:
                text = self.template.render(_shaped(probe, shape), tools=list(tools) or None, **variables)
            except ChatTemplateError as error:
                problem = problem or error
                continue
            if all(value in text for value in values) and "{'key'" not in text:
                return shape
        raise ChatTemplateError(
            f"chat template {self.template.name!r} does not show calls that were made, so their results would mean "
            f"nothing to the model" + (f"; it said: {problem}" if problem else "")
        ) from problem


def _shaped(messages: Sequence[Mapping[str, Any]], shape: Shape) -> list[dict[str, Any]]:
    """Conversation in the shape that a template expects."""
    out: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        calls = message.get("tool_calls")
        if not calls:
            if not (shape.one_call and message.get("role") == "tool" and _answered(messages[:i], message)):
                out.append(dict(message))
            continue
        groups = [[call] for call in calls] if shape.one_call else [calls]
        for n, group in enumerate(groups):
            own = dict(message) if n == 0 else {"role": message["role"], "content": ""}
            out.append(own | {"tool_calls": [_call(c, shape) for c in group]})
            if not own.get("content"):
                out[-1]["content"] = shape.content
            if shape.one_call:
                out += [dict(m) for m in messages[i + 1 :] if _answers(m, group[0])]
    return out


def _answers(message: Mapping[str, Any], call: Mapping[str, Any]) -> bool:
    return message.get("role") == "tool" and message.get("tool_call_id") == call.get("id") is not None


def _answered(before: Sequence[Mapping[str, Any]], message: Mapping[str, Any]) -> bool:
    """True if a result already follows its call."""
    return any(_answers(message, call) for m in before for call in m.get("tool_calls") or ())


def _call(call: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """Call with its arguments in the form that the template expects: an object or JSON text."""
    function = dict(call["function"])
    arguments = function.get("arguments") or {}
    if shape.text_arguments and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not shape.text_arguments and isinstance(arguments, str):
        arguments = json.loads(arguments)
    return {**call, "function": function | {"arguments": arguments}}


def _with_thinking(message: Mapping[str, Any]) -> dict[str, Any]:
    """gpt-oss's template knows reasoning as `thinking`, and beside calls it takes that or content, not both."""
    thinking = message.get("reasoning_content")
    if not thinking:
        return dict(message)
    return {**message, "thinking": thinking} | ({"content": ""} if message.get("tool_calls") else {})
