"""Chat loop: prompt, generation and tool calls, repeated while there are results of tools for the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from oxjax.chat.call_grammar import call_grammar
from oxjax.chat.cursor import delimiters
from oxjax.chat.forms import ToolCall, function_of
from oxjax.chat.parser import ChatParser, Delta
from oxjax.chat.prompt import Prompter
from oxjax.chat.tool_format import Dialect, detect, named
from oxjax.chat.tools import ToolDispatcher, ToolResult
from oxjax.constrain import Grammar
from oxjax.engine.output import Chunk
from oxjax.errors import ChatTemplateError, InvalidRequestError
from oxjax.sampling.params import SamplingParams
from oxjax.tokenizer import Tokenizer
from oxjax.tokenizer.chat import ChatTemplate

Tool = Mapping[str, Any] | Callable[..., Any]
Generate = Callable[[list[int], SamplingParams], Generator[Chunk, None, Any]]


@dataclass(frozen=True)
class ChatResult:
    """Result of a chat.

    Attributes:
        content: the answer: the text of the last message.
        reasoning: text before the answer, if the model's format marks it.
        tool_calls: calls of the last message, which were not run.
        messages: the conversation with all new messages, in the format of chat templates.
        results: the `Result` of each round, in order: ids, log-probabilities, seed.
        finish_reason: "tool_calls" if calls are left, else that of the last round.
    """

    content: str
    reasoning: str
    tool_calls: list[ToolCall]
    messages: list[dict[str, Any]]
    results: list[Any]
    finish_reason: str


@dataclass(frozen=True)
class ChatDelta(Delta):
    """New part of a chat: a field of `Delta`, or one of the following.

    Attributes:
        tool_result: result of a call.
        result: of the whole chat; only the last delta has it.
    """

    tool_result: ToolResult | None = None
    result: ChatResult | None = None


@dataclass(frozen=True)
class Turn:
    """Message that the model is to generate.

    Attributes:
        ids: of the prompt.
        params: sampling parameters.
        parser: makes a parser for the output.
    """

    ids: list[int]
    params: SamplingParams
    parser: Callable[[], ChatParser]


class Session:
    """Chats with a model: its template, tokenizer and dialect.

    Args:
        template: the model's.
        tokenizer: the model's.
        dialect: format of calls and reasoning, or a name of `DIALECTS`; None detects it from the template.

    Raises:
        ChatTemplateError: the dialect is unknown.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        dialect: Dialect | str | None = None,
    ):
        # A model's template for tools shows what the other one may leave out.
        source = template.source + (template.tool_use.source if template.tool_use else "")
        if dialect is None:
            dialect = detect(source)
        self.dialect = named(dialect, source) if isinstance(dialect, str) else dialect
        self.tokenizer = tokenizer
        self._prompter = Prompter(template, tokenizer, self.dialect)
        self._shown: dict[int, bool] = {}

    def turn(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        params: SamplingParams,
        schemas: Sequence[Mapping[str, Any]] = (),
        tool_choice: str = "auto",
        **variables: Any,
    ) -> Turn:
        """Prepare the next message of a conversation: its prompt, parameters and parser.

        Args:
            messages: see `LLM.chat`.
            params: sampling parameters.
            schemas: JSON schemas of the tools.
            tool_choice: see `LLM.chat`.
            variables: of the template.

        Raises:
            InvalidRequestError, ChatTemplateError: as for `LLM.chat`.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        _check(messages)
        _check_tools(schemas)
        wanted = [s for s in schemas if tool_choice in ("required", function_of(s)["name"])]
        if tool_choice != "auto" and (not wanted or params.grammar is not None):
            raise InvalidRequestError(
                f"tool_choice {tool_choice!r}: expected 'auto', 'required' with tools or the name of one, and then no "
                "grammar of your own"
            )
        if schemas and not self.dialect.has_calls:
            raise ChatTemplateError(
                f"chat template {self._prompter.template.name!r} shows no format of calls that oxjax knows: name one "
                "with dialect, or make one with Dialect.custom"
            )
        dialect = self.dialect if schemas else self.dialect.without_calls()
        ids, text = self._prompter.prompt(list(messages), schemas, **variables)
        n_calls = sum(len(m.get("tool_calls") or ()) for m in messages)
        if tool_choice != "auto":
            params = replace(params, grammar=Grammar.lark(call_grammar(dialect, wanted, self.tokenizer)))
        return Turn(ids, params, partial(ChatParser, dialect, schemas, prompt=text, n_calls=n_calls))

    def stream(
        self,
        generate: Generate,
        messages: str | Sequence[Mapping[str, Any]],
        params: SamplingParams,
        tools: Sequence[Tool] = (),
        max_rounds: int = 8,
        tool_choice: str = "auto",
        **variables: Any,
    ) -> Iterator[ChatDelta]:
        """Continue a conversation; see `LLM.chat`.

        Args:
            generate: ids and parameters to chunks, and the round's result as the generator's value.
            messages, params, tools, max_rounds, tool_choice, variables: see there.
        """
        if max_rounds < 0:
            raise InvalidRequestError(f"max_rounds {max_rounds}: expected at least 0")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        dispatcher = ToolDispatcher(tool for tool in tools if callable(tool))
        declared = [tool for tool in tools if not callable(tool)]
        schemas, returned = [*dispatcher.schemas.values(), *declared], {function_of(t).get("name") for t in declared}
        turn = self.turn(messages, params, schemas, tool_choice, **variables)
        if dispatcher.schemas and max_rounds:
            self._prompter.shape(schemas, **variables)  # better no call is run than one whose result cannot be told
        conversation, results = [dict(m) for m in messages], []
        while True:
            parser = turn.parser()
            results.append((yield from self.read(generate(turn.ids, turn.params), turn.params.stop, parser)))
            message = parser.message
            conversation.append(message.as_dict())
            runs = dispatcher.schemas and not {c.name for c in message.tool_calls} & returned
            if not message.tool_calls or not runs or len(results) > max_rounds:
                break
            for call in message.tool_calls:
                answer = dispatcher.invoke(call)
                conversation.append(answer.as_dict())
                yield ChatDelta(tool_result=answer)
            turn = self.turn(conversation, params, schemas, **variables)
        reason = "tool_calls" if message.tool_calls else results[-1].finish_reason
        yield ChatDelta(
            result=ChatResult(message.content, message.reasoning, message.tool_calls, conversation, results, reason)
        )

    def read(
        self, generated: Generator[Chunk, None, Any], stop: Sequence[str], parser: ChatParser
    ) -> Generator[ChatDelta, None, Any]:
        """Read a message as it is generated, and close the generator; returns the generator's value.

        Args:
            generated: chunks.
            stop: texts that end the message.
            parser: has the whole message at the end.
        """
        detokenizer = self.tokenizer.detokenizer(continues=True)
        stops, held = delimiters(*stop), ""
        with closing(generated) as chunks:
            while True:
                try:
                    chunk = next(chunks)
                except StopIteration as end:
                    result = end.value
                    break
                stop_text = chunk.stop_reason if isinstance(chunk.stop_reason, str) else None
                done = chunk.finish_reason is not None
                ends_turn = chunk.finish_reason == "stop" and stop_text is None
                text = held
                if not ends_turn and self._is_shown(chunk.token_id):
                    text += detokenizer.push(chunk.token_id)
                if done:
                    text += detokenizer.flush()
                if stop_text is not None:
                    text = text.partition(stop_text)[0]
                keep = 0 if done else stops.partial(text)
                held = text[len(text) - keep :]
                yield from _as_chat(parser.feed(text[: len(text) - keep]))
        yield from _as_chat(parser.finish())
        return result

    def _is_shown(self, token: int) -> bool:
        """True if a token's text belongs to the message; a special token's only if the dialect uses it."""
        if token not in self._shown:
            text = self.tokenizer.token_text(token)
            known = any(text in marker for marker in self.dialect.markers)
            self._shown[token] = known or not self.tokenizer.is_special(token)
        return self._shown[token]


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse messages without a role, and malformed calls."""
    if not messages:
        raise InvalidRequestError("the conversation is empty")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequestError(f"message {i}: found {message!r:.80}; expected a dict with a role")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list | tuple):
            raise InvalidRequestError(f"message {i}: found the calls {calls!r:.80}; expected a list")
        for call in calls:
            function = call.get("function") if isinstance(call, Mapping) else None
            function = function if isinstance(function, Mapping) else {}
            arguments = function.get("arguments")
            try:
                arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            except ValueError as error:
                raise InvalidRequestError(f"message {i}: the arguments of a call are not JSON: {error}") from error
            if not isinstance(function.get("name"), str) or not isinstance(arguments, dict | None):
                raise InvalidRequestError(f"message {i}: found the call {call!r:.80}; expected a name and arguments")


def _as_chat(deltas: list[Delta]) -> list[ChatDelta]:
    return [ChatDelta(d.content, d.reasoning, d.tool_call) for d in deltas]


def _check_tools(schemas: Sequence[Mapping[str, Any]]) -> None:
    for schema in schemas:
        function = schema.get("function", schema) if isinstance(schema, Mapping) else None
        function = function if isinstance(function, Mapping) else {}
        name, parameters = function.get("name"), function.get("parameters") or {}
        if not isinstance(name, str) or not name or not isinstance(parameters, Mapping):
            raise InvalidRequestError(f"tool {schema!r:.80}: expected a function with a name and a schema")
