"""Typed errors. Each message names the offender, the value found and the value expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class OxjaxError(Exception):
    """Base of every error of this package. Errors can be pickled, with their attributes."""

    def __reduce__(self) -> tuple[object, ...]:
        return _without_init, (type(self), self.args), self.__dict__


def _without_init(kind: type[OxjaxError], args: tuple[object, ...]) -> OxjaxError:
    """An error as it was raised: `args` hold the finished message, which `__init__` would build again."""
    return kind.__new__(kind, *args)


class GGUFError(OxjaxError):
    """A GGUF file is truncated, corrupt, of an unsupported kind, or lies about its own contents.

    Args:
        message: the value found and the value expected.
        path: the file.
        offset: byte offset of the fault in the file, if there is one.
        field: the faulty header field, metadata key or tensor, if there is one.
    """

    def __init__(self, message: str, *, path: object, offset: int | None = None, field: str | None = None):
        self.path, self.offset, self.field, self.reason = str(path), offset, field, message
        where = [str(path)]
        if offset is not None:
            where.append(f"offset {offset}")
        if field is not None:
            where.append(f"field {field!r}")
        super().__init__(f"{', '.join(where)}: {message}")


class TokenizerError(OxjaxError):
    """The vocabulary of a file cannot be turned into a tokenizer, or ids do not belong to it."""


class UnknownPreTokenizerError(TokenizerError):
    """`tokenizer.ggml.pre` names a pre-tokeniser that oxjax does not know. It is never guessed."""


class ChatTemplateError(OxjaxError):
    """A chat template is missing, malformed, unsafe, too expensive, or refused the conversation."""


class ToolError(OxjaxError):
    """A Python function cannot be offered to a model as a tool."""


class ModelError(OxjaxError):
    """A model file does not describe a model that oxjax can run."""


class UnsupportedArchitectureError(ModelError):
    """`general.architecture` names an architecture that oxjax does not have."""


class BackendUnavailableError(ModelError):
    """The backend that was asked for cannot run on this machine."""


class RequestError(OxjaxError):
    """One request failed; the engine and the other requests are unharmed.

    Attributes:
        index: index of the first prompt that failed, for a call with several.
        results: results of the other prompts of the call, with None for each failed one.
    """

    index: int | None = None
    results: tuple[Any, ...] = ()


class InvalidRequestError(RequestError, ValueError):
    """A request is malformed: a bad sampling parameter, token id or prompt. Nothing was computed for it."""


class GrammarError(InvalidRequestError):
    """A grammar is malformed, unsupported or too large, or tokens are not in its language.

    Args:
        message: the value found and the value expected.
        line: line in the grammar's text, from 1, if there is one.
        column: character in that line, from 1.
    """

    def __init__(self, message: str, *, line: int | None = None, column: int | None = None):
        self.line, self.column, self.reason = line, column, message
        super().__init__(message if line is None else f"line {line}, column {column}: {message}")


class GrammarStuckError(RequestError):
    """No token can continue the text under its grammar, or the search for one exceeds a limit."""


class RequestTooLargeError(RequestError):
    """A request can never fit: its prompt, or prompt and output, exceed the context or the page pool."""


class NonFiniteLogitsError(RequestError):
    """The model produced NaN or infinite logits for this request."""


class NothingLeftError(RequestError):
    """The bans of a request and its grammar leave no token to choose."""


class CacheError(OxjaxError):
    """Misuse or exhaustion of the pages and slots that hold the state of sequences."""


class PoolExhaustedError(CacheError):
    """A pool has fewer free pages or slots than were asked for; none was taken."""


class StaleHandleError(CacheError):
    """A handle on a sequence's state was released before, or belongs to another pool."""


class WrongKindError(CacheError):
    """State of one kind of layers was given to a pool of another kind."""


class CannotTruncate(CacheError):
    """A sequence cannot go back to that position; nothing was changed.

    Args:
        target: the requested position.
        available: positions that the sequence can go back to, in order.
    """

    def __init__(self, target: int, available: Sequence[int]):
        self.target, self.available = target, tuple(available)
        shown = ", ".join(map(str, self.available[:20])) + (", ..." if len(self.available) > 20 else "")
        super().__init__(f"no state is kept for position {target}; there is one for {shown}")


class SnapshotError(OxjaxError):
    """A snapshot is damaged, of another version, or does not fit this engine; the engine is as it was."""


class SnapshotMismatchError(SnapshotError):
    """A snapshot comes from another model, or from the same one with other numerics.

    Args:
        expected: fingerprint of this engine's model.
        found: fingerprint in the snapshot.
    """

    def __init__(self, expected: str, found: str):
        self.expected, self.found = expected, found
        super().__init__(
            f"the snapshot was made with the model {found}, and this engine runs {expected}: load the same file with "
            "the same dtype, exactness and backend"
        )


class BatchError(OxjaxError):
    """A run over a file of requests cannot start, resume or be verified; existing results are unchanged."""


class EngineClosedError(OxjaxError):
    """The engine was closed; build a new `LLM`."""
