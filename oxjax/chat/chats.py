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
    """Mixin of `LLM`: chats, with templates and tools."""

    tokenizer: Tokenizer
    path: Path
    _start: Callable[[list[int], SamplingParams], Request]
    _stream: Callable[[Request, None], Iterator[Chunk]]

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """Chat template of the file.

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
        """Generate the next message of a conversation, and run the tools that the model calls.

        Args:
            messages: dicts with `role` and `content`, and `tool_calls` as in the OpenAI API, or the text of one user
                message. Special tokens of the model that a message spells are plain text.
            params: sampling parameters of every round.
            tools: Python functions, which are run when the model calls them (see `tool_schema` and `ToolDispatcher`),
                and JSON schemas, whose calls are returned. Without tools, the answer is not searched for calls.
            max_rounds: number of times that results of tools go back to the model; later calls are returned.
            tool_choice: "required" makes the first message a call, in the model's format and with arguments that its
                schema allows; the name of a tool makes it a call of that one.
            template: Jinja text or a template to use instead of the file's.
            dialect: format of calls and reasoning (or a name of `DIALECTS`) instead of the one detected from the
                template.
            variables: of the template, `enable_thinking` for example, and `date`, `documents` and
                `add_generation_prompt` of `ChatTemplate.render`.

        Raises:
            ChatTemplateError: there is no template, it rejected the conversation, or there are tools and it has no
                format of calls.
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
        """Stream a `chat`: answer, reasoning, calls and results as they come; the last delta has the whole `result`."""
        if isinstance(template, str):
            template = ChatTemplate(template, **template_tokens(self.tokenizer))
        template = self.chat_template if template is None else template
        session = Session(template, self.tokenizer, dialect)
        params = params or SamplingParams()
        return session.stream(self._chunks, messages, params, tools, max_rounds, tool_choice, **variables)

    def _chunks(self, prompt: list[int], params: SamplingParams) -> Generator[Chunk, None, Result]:
        """Chunks of a prompt's stream; the generator's value is its result."""
        request = self._start(prompt, params)
        yield from self._stream(request, None)
        return request.result()
