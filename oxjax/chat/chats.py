"""`LLM.chat` and `LLM.stream_chat`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from oxjax.chat.prompt import read_template, template_tokens
from oxjax.chat.session import ChatDelta, ChatResult, Session, Tool
from oxjax.chat.tool_format import Dialect
from oxjax.engine.output import Chunk
from oxjax.engine.request import Request
from oxjax.results import Result
from oxjax.sampling.params import SamplingParams
from oxjax.tokenizer import Tokenizer
from oxjax.tokenizer.chat import ChatTemplate


class Chats:
    """The part of `LLM` that goes through chat templates."""

    tokenizer: Tokenizer
    path: Path
    _start: Callable[[list[int], SamplingParams], Request]
    _stream: Callable[[Request, None], Iterator[Chunk]]

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The file's chat template.

        Raises:
            ChatTemplateError: it has none.
        """
        return read_template(self.path, self.tokenizer)

    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Tool] = (),
        max_rounds: int = 8,
        tool_choice: str = "auto",
        template: ChatTemplate | str | None = None,
        dialect: Dialect | str | None = None,
        **variables: Any,
    ) -> ChatResult:
        """Continue a conversation with the model's own template, and run the tools that it calls.

        Args:
            messages: dicts with `role` and `content`, and `tool_calls` as in the OpenAI API, or one user's text. The
                special tokens of the model, spelled in a message, are plain text.
            params: how to sample, each round alike.
            tools: Python functions, which are run on the calls (see `tool_schema` and `ToolDispatcher`), and JSON
                schemas, whose calls are returned. Without tools, calls are not looked for.
            max_rounds: how often results may go back to the model; calls made after that are returned.
            tool_choice: "required" makes the first message a call, in the model's format and with arguments that its
                schema allows; the name of a tool makes it a call of that one.
            template: Jinja text or a template to use instead of the file's.
            dialect: how the model writes calls and reasoning, a name of `DIALECTS` included, instead of what the
                template shows.
            variables: of the template, `enable_thinking` for example, and `date`, `documents` and
                `add_generation_prompt` of `ChatTemplate.render`.

        Raises:
            ChatTemplateError: there is no template, it refused, or it shows no calls and there are tools.
            ToolError: a function cannot be a tool.
            RequestError: as for `generate`.
        """
        *_, last = self.stream_chat(
            messages,
            params,
            tools=tools,
            max_rounds=max_rounds,
            tool_choice=tool_choice,
            template=template,
            dialect=dialect,
            **variables,
        )
        assert last.result is not None
        return last.result

    def stream_chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Tool] = (),
        max_rounds: int = 8,
        tool_choice: str = "auto",
        template: ChatTemplate | str | None = None,
        dialect: Dialect | str | None = None,
        **variables: Any,
    ) -> Iterator[ChatDelta]:
        """`chat`, with answer, reasoning, calls and results as they come; the last delta has the whole `result`."""
        if isinstance(template, str):
            template = ChatTemplate(template, **template_tokens(self.tokenizer))
        template = self.chat_template if template is None else template
        session = Session(template, self.tokenizer, dialect)
        params = params or SamplingParams()
        return session.stream(self._chunks, messages, params, tools, max_rounds, tool_choice, **variables)

    def _chunks(self, prompt: list[int], params: SamplingParams) -> Generator[Chunk, None, Result]:
        """The stream of a prompt, and then its result."""
        request = self._start(prompt, params)
        yield from self._stream(request, None)
        return request.result()
