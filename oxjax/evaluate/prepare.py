"""Preparation of the requests of a file: from a body to work for the engine, and from that to the answer."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from oxjax.chat.parser import ChatParser, Message
from oxjax.chat.prompt import template_tokens
from oxjax.chat.session import Session
from oxjax.engine.output import Chunk
from oxjax.engine.pooling import check_pooling, pool
from oxjax.engine.request import Request
from oxjax.errors import InvalidRequestError
from oxjax.evaluate import answers
from oxjax.evaluate.manifest import read_day
from oxjax.evaluate.request_format import BatchRequest, field, objects, only, params_of, reports
from oxjax.llm import LLM
from oxjax.tokenizer.chat import ChatTemplate

Body = dict[str, Any]

_SESSIONS = 8  # of different templates, before they are made again
_OURS = {"self", *inspect.signature(Session.turn).parameters, "tools"}  # no names for variables of templates


@dataclass(frozen=True)
class PreparedRequest:
    """A request that was read, checked and encoded.

    Attributes:
        n_tokens: estimate of the tokens that it takes.
        start: queues its work in the engine.
        finish: makes the answer from the finished requests of the engine, or from the hidden states of `texts`.
        texts: token ids for an encoder, which has no engine.
    """

    n_tokens: int
    start: Callable[[], list[Request]]
    finish: Callable[[list[Any]], Body]
    texts: list[list[int]] = dataclasses.field(default_factory=list)


class RequestPreparer:
    """Prepares the requests of one run.

    Args:
        llm: runs them.
        seed: of the run. A request without a seed gets one from it and from its own id, so that its answer does not
            depend on the other requests.
        date: YYYY-MM-DD, today's date for chat templates.
    """

    def __init__(self, llm: LLM, seed: int, date: str):
        self.llm, self.seed, self._date = llm, seed, read_day(date)
        self._sessions: dict[str | None, Session] = {}  # by the template that a request brings

    def prepare(self, request: BatchRequest) -> PreparedRequest:
        """Prepare a request.

        Raises:
            InvalidRequestError: a field is missing, unknown or has a wrong value.
            UnsupportedArchitectureError: the model is an encoder, and the request needs a causal model.
            TokenizerError, ChatTemplateError: its texts cannot be encoded.
        """
        if request.kind not in ("embed", "rerank"):
            self.llm.engine  # noqa: B018  (encoders have none, and say so)
        return getattr(self, f"_{request.kind}")(request)

    def _seed_of(self, request: BatchRequest, i: int = 0) -> int:
        """Derived seed of prompt `i` of a request without one."""
        data = f"{self.seed} {request.custom_id}".encode() + (b"\0%d" % i if i else b"")
        return int.from_bytes(blake2b(data, digest_size=8, person=b"oxjax batch").digest(), "little")

    def _generate(self, request: BatchRequest) -> PreparedRequest:
        body, llm = request.body, self.llm
        if "prompt" not in body:
            raise InvalidRequestError("prompt: missing")
        prompts = [llm._encode(_checked(text)) for text in _texts(body["prompt"])]
        params, wants = params_of(body, self._seed_of(request), "prompt"), reports(body)
        # Without a seed, equal prompts get different derived seeds.
        seeds = [params.seed if "seed" in body else self._seed_of(request, i) for i in range(len(prompts))]

        def start() -> list[Request]:
            return self._queue(lambda i: llm.engine.generate(prompts[i], params, seeds[i]), len(prompts))

        def finish(generations: list[Request]) -> Body:
            found = [generation.result() for generation in generations]
            results = [result for first in found for result in (first, *first.others)]
            n_prompt = sum(map(len, prompts))
            return answers.completion(results, n_prompt, llm.tokenizer, reports=wants)

        n_tokens = sum(len(prompt) + (params.max_tokens or llm.max_context) for prompt in prompts)
        return PreparedRequest(n_tokens, start, finish)

    def _queue(self, add: Callable[[int], Request], n: int) -> list[Request]:
        """Queue all parts of a request, or none."""
        requests: list[Request] = []
        try:
            for i in range(n):
                requests.append(add(i))
        except BaseException:
            self.llm.engine.cancel_all(requests)
            raise
        return requests

    def _session(self, source: str | None) -> Session:
        if source not in self._sessions:
            tokenizer = self.llm.tokenizer
            own = source is None
            template = self.llm.chat_template if own else ChatTemplate(source, **template_tokens(tokenizer))
            if len(self._sessions) == _SESSIONS:
                self._sessions.clear()
            self._sessions[source] = Session(template, tokenizer)
        return self._sessions[source]

    def _chat(self, request: BatchRequest) -> PreparedRequest:
        body, wants = request.body, reports(request.body)
        fields = ("messages", "tools", "tool_choice", "chat_template", "chat_template_kwargs")
        params = params_of(body, self._seed_of(request), *fields)
        session = self._session(field(body, "chat_template", str, None))
        messages, tools = objects(body, "messages"), objects(body, "tools")
        choice = _tool_choice(body)
        if choice == "none":
            tools, choice = [], "auto"
        variables = field(body, "chat_template_kwargs", dict, {})
        if taken := sorted(_OURS & set(variables)):
            raise InvalidRequestError(f"chat_template_kwargs: {', '.join(taken)} are no variables of templates")
        date = field(variables, "date", str, None)
        variables = {
            **variables,
            "date": self._date if date is None else read_day(date),
            "documents": field(variables, "documents", list, None),
            "add_generation_prompt": field(variables, "add_generation_prompt", bool, True),
        }
        turn = session.turn(messages, params, tools, choice, **variables)

        def message(generation: Request) -> Message:
            parser: ChatParser = turn.parser()
            for _ in session.read(_again(generation.output.chunks), turn.params.stop, parser):
                pass
            return parser.message

        def finish(generations: list[Request]) -> Body:
            (generation,) = generations
            first = generation.result()
            results = [first, *first.others]
            by_seed = {g.seed: g for g in (generation, *generation.samples)}
            read = [message(by_seed[result.seed]) for result in results]
            return answers.chat_completion(results, read, self.llm.tokenizer, reports=wants)

        n_tokens = len(turn.ids) + (params.max_tokens or self.llm.max_context)
        return PreparedRequest(n_tokens, lambda: [self.llm.engine.generate(turn.ids, turn.params, params.seed)], finish)

    def _score(self, request: BatchRequest) -> PreparedRequest:
        body = request.body
        only(body, "context", "continuation", "continuations")
        if ("continuation" in body) == ("continuations" in body):
            raise InvalidRequestError("expected continuation, or a list of continuations")
        texts = body.get("continuations", [body.get("continuation")])
        if not isinstance(texts, list) or not texts:
            raise InvalidRequestError("continuations: expected a list")
        context = body.get("context", "" if isinstance(texts[0], str) else None)
        contexts, continuations = zip(
            *(self.llm._encode_pair(tuple(map(_checked, (context, t)))) for t in texts), strict=True
        )
        n_tokens = len(contexts[0]) + sum(map(len, continuations))

        def finish(scorings: list[Request]) -> Body:
            return answers.scores([s.result() for s in scorings], len(contexts[0]))

        return PreparedRequest(n_tokens, lambda: self.llm.engine.score(contexts[0], continuations), finish)

    def _embed(self, request: BatchRequest) -> PreparedRequest:
        body, llm = request.body, self.llm
        only(body, "input", "pooling", "normalize", "encoding_format", "truncate")
        pooling, normalize = field(body, "pooling", str, llm.config.pooling), field(body, "normalize", bool, True)
        encoding, truncate = field(body, "encoding_format", str, "float"), field(body, "truncate", int, None)
        check_pooling(pooling)
        llm._check_truncate(truncate)
        if encoding not in ("float", "base64"):
            raise InvalidRequestError(f"encoding_format {encoding!r}: expected float or base64")
        texts = [llm._encode(_checked(text), truncate) for text in _texts(body.get("input"))]

        def finish(vectors: list[np.ndarray], n_tokens: int) -> Body:
            return answers.embeddings(vectors, n_tokens, encoding)

        return self._pooled(texts, pooling, finish, normalize=normalize)

    def _rerank(self, request: BatchRequest) -> PreparedRequest:
        body, llm = request.body, self.llm
        only(body, "query", "documents", "top_n")
        llm._check_rank()
        documents, top_n = field(body, "documents", list, []), field(body, "top_n", int, None)
        if not documents or (top_n is not None and top_n < 1):
            raise InvalidRequestError("expected documents, and top_n at least 1 where it is given")
        query = _checked(body.get("query"))
        texts = [llm._encode_document(query, _checked(document)) for document in documents]

        def finish(rows: list[np.ndarray], n_tokens: int) -> Body:
            return answers.ranking(llm._rank(rows), n_tokens, top_n)

        return self._pooled(texts, llm.config.rank.pooling, finish, normalize=False)

    def _pooled(
        self, texts: list[list[int]], pooling: str, finish: Callable[[list[np.ndarray], int], Body], *, normalize: bool
    ) -> PreparedRequest:
        """Prepare a request whose answer is made from pooled hidden states of texts and their number of tokens."""
        llm, n_tokens = self.llm, sum(map(len, texts))

        def pooled(found: list[Any]) -> Body:
            rows = [r.result() if isinstance(r, Request) else r for r in found]
            return finish([pool(r, pooling, normalize=normalize) for r in rows], n_tokens)

        def start() -> list[Request]:
            return self._queue(lambda i: llm.engine.hidden(texts[i]), len(texts))

        if llm.config.causal:
            return PreparedRequest(n_tokens, start, pooled)
        for ids in texts:
            llm.encoder.check(ids)
        return PreparedRequest(n_tokens, list, pooled, texts)


def _tool_choice(body: Body) -> str:
    """`tool_choice` as a word or the name of a tool, which OpenAI's API wraps in an object."""
    choice = body.get("tool_choice", "auto")
    if isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("function"), dict):
        choice = choice["function"].get("name")
    if not isinstance(choice, str):
        raise InvalidRequestError(f"tool_choice {choice!r:.60}: expected 'none', 'auto', 'required' or a function")
    return choice


def _texts(given: Any) -> list[Any]:
    """List of one or several prompts, each a text or token ids."""
    if given == []:
        raise InvalidRequestError("found []; expected a text, token ids or a list of these")
    return given if isinstance(given, list) and not isinstance(given[0], int) else [given]


def _checked(text: object) -> str | list[int]:
    """The prompt, if it is text or token ids."""
    if isinstance(text, str):
        return text
    if isinstance(text, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in text):
        return text
    raise InvalidRequestError(f"found {text!r:.60}; expected a text or a list of token ids")


def _again(chunks: Sequence[Chunk]) -> Generator[Chunk, None, None]:
    yield from chunks
