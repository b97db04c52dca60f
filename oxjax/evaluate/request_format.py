"""Format of request files: lines of JSON, as in OpenAI's batch API or shorter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from oxjax.constrain import Grammar
from oxjax.constrain.grammar import KINDS as GRAMMARS
from oxjax.errors import InvalidRequestError
from oxjax.sampling.params import SamplingParams

URLS = {
    "/v1/completions": "generate",
    "/v1/chat/completions": "chat",
    "/v1/embeddings": "embed",
    "/v1/score": "score",
    "/v1/rerank": "rerank",
}
# Kind of a line without a url, by a field that only this kind has.
_KIND_FIELDS = {
    "prompt": "generate",
    "messages": "chat",
    "input": "embed",
    "continuation": "score",
    "continuations": "score",
    "query": "rerank",
}
_ENVELOPE = ("custom_id", "id", "method", "url", "body")
# Fields that do not change the answer; and fields of streams and completions, with the one value that is accepted.
_IGNORED = ("model", "user", "metadata", "store", "service_tier", "stream_options", "safety_identifier")
_NEUTRAL = {"echo": False, "suffix": "", "parallel_tool_calls": True, "stream": False}
_SAMPLING = {f.name for f in fields(SamplingParams)} - {"grammar", "logprobs"}


@dataclass(frozen=True)
class BatchRequest:
    """A request of a file.

    Attributes:
        custom_id: its id, unique in the file.
        kind: one of `URLS`'s values.
        body: its fields.
    """

    custom_id: str
    kind: str
    body: dict[str, Any]


def read_line(line: bytes) -> BatchRequest:
    """Read the request of a line.

    Raises:
        InvalidRequestError: the line is not a request.
    """
    raw = _parse(line)
    custom_id = _id(raw)
    if raw.get("method", "POST") != "POST":
        raise InvalidRequestError(f"method {raw['method']!r}: expected 'POST'")
    body = raw.get("body", {k: v for k, v in raw.items() if k not in _ENVELOPE})
    if not isinstance(body, dict):
        raise InvalidRequestError(f"body: found {type(body).__name__}; expected an object")
    if "body" in raw and (stray := set(raw) - set(_ENVELOPE)):
        raise InvalidRequestError(f"{', '.join(sorted(stray))}: expected inside the body")
    body = {k: v for k, v in body.items() if v is not None}
    if "url" in raw:
        if raw["url"] not in URLS:
            raise InvalidRequestError(f"url {raw['url']!r}: expected one of {', '.join(URLS)}")
        return BatchRequest(custom_id, URLS[raw["url"]], body)
    kinds = {kind for name, kind in _KIND_FIELDS.items() if name in body}
    if len(kinds) != 1:
        raise InvalidRequestError("expected a url, or one of " + ", ".join(_KIND_FIELDS))
    return BatchRequest(custom_id, kinds.pop(), body)


def read_id(line: bytes) -> str:
    """Read the id of a line's request, even if the rest is wrong.

    Raises:
        InvalidRequestError: the line has no id.
    """
    return _id(_parse(line))


def _parse(line: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise InvalidRequestError(f"found {type(raw).__name__}; expected an object")
    return raw


def _id(raw: Mapping[str, Any]) -> str:
    found = [raw[name] for name in ("custom_id", "id") if raw.get(name) is not None]
    if len(found) != 1 or isinstance(found[0], bool) or not isinstance(found[0], str | int):
        raise InvalidRequestError("custom_id: expected a string")
    custom_id = str(found[0])
    try:
        custom_id.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(f"custom_id {custom_id!r}: found a lone surrogate; expected text") from None
    return custom_id


def field(body: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    """A field of a body, of one JSON type.

    Raises:
        InvalidRequestError: it has another type.
    """
    value = body.get(name, default)
    if value is not default and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise InvalidRequestError(f"{name}: found {type(value).__name__}; expected {kind.__name__}")
    return value


def objects(body: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """A field that is a list of objects.

    Raises:
        InvalidRequestError: it is not a list of objects.
    """
    found = field(body, name, list, [])
    if not all(isinstance(item, dict) for item in found):
        raise InvalidRequestError(f"{name}: expected a list of objects")
    return found


def only(body: Mapping[str, Any], *known: str) -> None:
    """Refuse fields that nothing reads.

    Raises:
        InvalidRequestError: there are unknown fields.
    """
    if unknown := sorted(set(body) - {*known, *_IGNORED}):
        raise InvalidRequestError(f"{', '.join(unknown)}: unknown; expected {', '.join(sorted(known))}")


def params_of(body: Mapping[str, Any], seed: int, *others: str) -> SamplingParams:
    """Sampling parameters of a body: OpenAI's names, and all of `SamplingParams`'s own.

    Args:
        body: of a request.
        seed: default for a body without one.
        others: known fields that are not sampling parameters.

    Raises:
        InvalidRequestError: unknown fields, or wrong values.
    """
    names = {"max_completion_tokens", "logprobs", "top_logprobs", "response_format", "grammar"}
    only(body, *_SAMPLING, *names, *_NEUTRAL, *others)
    for name, value in _NEUTRAL.items():
        if body.get(name, value) != value:
            raise InvalidRequestError(f"{name} {body[name]!r:.40}: not supported; expected {value!r}")
    given = {name: body[name] for name in _SAMPLING & set(body)}
    if "max_completion_tokens" in body:
        given["max_tokens"] = body["max_completion_tokens"]
    if "logit_bias" in given and isinstance(given["logit_bias"], dict):
        try:
            given["logit_bias"] = {int(token): value for token, value in given["logit_bias"].items()}
        except ValueError:
            raise InvalidRequestError("logit_bias: expected token ids") from None
    wanted = body.get("logprobs", False)  # a number for completions, for chats a flag beside `top_logprobs`
    if not isinstance(wanted, bool):
        given["logprobs"] = wanted
    elif wanted:
        given["logprobs"] = body.get("top_logprobs", 0)
    if "top_logprobs" in body and wanted is not True:
        raise InvalidRequestError("top_logprobs: expected with logprobs true")
    try:
        return SamplingParams(**{"seed": seed, **given}, grammar=_grammar(body))
    except TypeError as error:
        raise InvalidRequestError(f"sampling parameters: {error}") from None


def reports(body: Mapping[str, Any]) -> bool:
    """True if the request wants log-probabilities."""
    return body.get("logprobs", False) is not False


def _grammar(body: Mapping[str, Any]) -> Grammar | None:
    """Grammar of `response_format`, or of `grammar`, an object with one of the kinds of grammars."""
    form, own = body.get("response_format"), body.get("grammar")
    if form is None and own is None:
        return None
    if form is not None and own is not None:
        raise InvalidRequestError("response_format and grammar: expected one of them")
    if own is not None:
        if not isinstance(own, dict) or len(own) != 1 or not set(own) <= set(GRAMMARS):
            raise InvalidRequestError(f"grammar: expected an object with one of {', '.join(GRAMMARS)}")
        ((kind, source),) = own.items()
        return getattr(Grammar, kind)(source)
    given = form if isinstance(form, dict) else {}
    kind, schema = given.get("type"), given.get("json_schema")
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar.json_schema({"type": "object"})
    if kind == "json_schema" and isinstance(schema, dict) and "schema" in schema:
        return Grammar.json_schema(schema["schema"])
    raise InvalidRequestError(f"response_format {form!r:.80}: expected type text, json_object or json_schema")
