"""Parser of a model's output, as it streams, to answer, reasoning and tool calls."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from oxjax.chat.cursor import Cursor, Malformed, Reader, delimiters
from oxjax.chat.forms import ToolCall, function_of
from oxjax.chat.tool_format import HARMONY_MARKERS, CallForm, Dialect

_HARMONY_ENDS = tuple(m for m in HARMONY_MARKERS if m not in ("<|message|>", "<|constrain|>"))
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"to=([^\s<]+)")


@dataclass(frozen=True)
class Delta:
    """New part of a message; exactly one attribute is set.

    Attributes:
        content: more of the answer.
        reasoning: more of the reasoning.
        tool_call: a call, complete.
    """

    content: str = ""
    reasoning: str = ""
    tool_call: ToolCall | None = None


@dataclass
class Message:
    """Message of the assistant.

    Attributes:
        content: the answer, without white space around it.
        reasoning: before the answer, likewise.
        tool_calls: in their order.
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Message in the format of chat templates."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in self.tool_calls
            ]
        return message


class ChatParser:
    """Parses a message while it is generated.

    The message does not depend on how its text was cut into pieces. Text that begins like a call, but whose JSON is
    malformed or never ends, stays in the answer, and the text after its first delimiter is parsed again.

    Args:
        dialect: format of calls and reasoning.
        tools: JSON schemas of the functions, for dialects that write arguments without their types.
        prompt: the text before the message; if it ends with the beginning of reasoning, the message begins inside it.
        n_calls: number of earlier calls in the conversation; generated ids of calls count from there.

    Attributes:
        message: parsed so far.
    """

    def __init__(
        self,
        dialect: Dialect,
        tools: Iterable[Mapping[str, Any]] = (),
        *,
        prompt: str = "",
        n_calls: int = 0,
    ):
        self.message = Message()
        self._dialect, self._n_calls = dialect, n_calls
        functions = map(function_of, tools)
        self._types = {f.get("name", ""): (f.get("parameters") or {}).get("properties") or {} for f in functions}
        self._cursor, self._deltas = Cursor(), list[Delta]()
        self._held = {"content": "", "reasoning": ""}  # white space that only counts if more text follows
        opened = next((end for begin, end in dialect.reasoning if prompt.rstrip().endswith(begin)), None)
        self._reader: Reader[None] | None = self._harmony() if dialect.harmony else self._read(opened)

    def feed(self, text: str) -> list[Delta]:
        """Parse more text of the message; returns the parts that are certain now."""
        self._cursor.text += text
        return self._advance()

    def finish(self) -> list[Delta]:
        """End the message; returns the rest. An incomplete call is text."""
        self._cursor.final = True
        return self._advance()

    def _advance(self) -> list[Delta]:
        if self._reader is not None:
            try:
                next(self._reader)
            except StopIteration:
                self._reader = None
        deltas, self._deltas = self._deltas, []
        return deltas

    def _read(self, opened: str | None) -> Reader[None]:
        """Read a whole message; `opened` ends the reasoning that it begins in."""
        cursor, dialect = self._cursor, self._dialect
        reasoning = dict(dialect.reasoning)
        begins = tuple(form.begin for form in dialect.calls if form.begin)
        markers = (*begins, *dialect.ignored)
        if opened is not None:
            yield from self._text_until("reasoning", opened)
        fresh = True  # no answer yet, or none since a call: only here do reasoning and undelimited calls begin
        while True:
            if fresh:
                at = cursor.at
                yield from cursor.skip_space()
                self._text("content", cursor.text[at : cursor.at])
                found = yield from cursor.take(*markers, *reasoning, *reasoning.values())
                fresh = found is not None or (yield from self._calls(""))
            else:
                found = yield from self._text_until("content", *markers)
                if found is None:
                    return
            if found in reasoning:
                yield from self._text_until("reasoning", reasoning[found])
            elif found in begins:
                fresh = yield from self._calls(found)
                if not fresh:
                    self._text("content", found)

    def _calls(self, begin: str) -> Reader[bool]:
        """Read the calls after their beginning; True if there are any."""
        cursor = self._cursor
        after, start = cursor.at, cursor.at - len(begin)
        forms = [f for f in self._dialect.calls if begin.startswith(f.begin) and bool(f.begin) == bool(begin)]
        for form in sorted(forms, key=lambda f: -len(f.begin)):
            cursor.at = start + len(form.begin)
            try:
                self._add((yield from form.read(cursor, self._types)))
            except Malformed:
                continue
            yield from self._more_calls(form)
            return True
        cursor.at = after
        return False

    def _more_calls(self, form: CallForm) -> Reader[None]:
        """Read further calls up to the end of the block, if it has one."""
        cursor = self._cursor
        while True:
            done = cursor.at
            yield from cursor.skip_space()
            if form.end and (yield from cursor.take(form.end)):
                return
            try:
                if not form.repeats:
                    raise Malformed
                yield from cursor.take(",", ";")
                self._add((yield from form.read(cursor, self._types)))
            except Malformed:
                cursor.at = done
                return

    def _harmony(self) -> Reader[None]:
        """Read a message of gpt-oss: headers with a channel and perhaps a recipient, each before a text."""
        cursor = self._cursor
        while True:
            try:
                header, _ = yield from cursor.until("<|message|>")
            except Malformed:
                rest = cursor.text[cursor.at :]
                if not rest.lstrip().startswith(("<|", "to=")):  # what is no header is the answer
                    self._text("content", rest)
                return
            channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
            kind, begin = "reasoning" if channel and channel.group(1) == "analysis" else "content", cursor.at
            if recipient:
                try:
                    arguments = yield from cursor.json()
                    if not isinstance(arguments, dict):
                        raise Malformed
                    self._add([ToolCall(recipient.group(1).removeprefix("functions."), arguments)])
                    kind = None
                except Malformed:
                    kind, cursor.at = "content", begin
            found = yield from self._text_until(kind, *_HARMONY_ENDS)
            if found in ("<|start|>", "<|channel|>"):
                cursor.at -= len(found)

    def _text_until(self, kind: str | None, *ends: str) -> Reader[str | None]:
        """Emit text of a kind (None drops it) up to one of these texts, which is returned, or to the end."""
        cursor = self._cursor
        while True:
            at, found = delimiters(*ends).search(cursor.text, cursor.at, cursor.final)
            if kind is not None:
                self._text(kind, cursor.text[cursor.at : at])
            cursor.at = at + len(found or "")
            if found is not None or cursor.final:
                return found
            cursor.drop_read()
            yield

    def _text(self, kind: str, text: str) -> None:
        known = getattr(self.message, kind)
        text = self._held[kind] + text
        text = text if known else text.lstrip()
        certain = text.rstrip()
        self._held[kind] = text[len(certain) :]
        if certain:
            setattr(self.message, kind, known + certain)
            self._deltas.append(Delta(content=certain) if kind == "content" else Delta(reasoning=certain))

    def _add(self, calls: list[ToolCall]) -> None:
        for call in calls:
            number = self._n_calls + len(self.message.tool_calls)
            known = call if call.id else replace(call, id=f"call{number:05d}")
            self.message.tool_calls.append(known)
            self._deltas.append(Delta(tool_call=known))
