"""Every error oxjax raises on purpose. Each names the offender, what was found and what was expected."""

from __future__ import annotations

from collections.abc import Sequence


class OxjaxError(Exception):
    """Base of every error of this package."""


class GGUFError(OxjaxError):
    """A GGUF file is truncated, corrupt, of an unsupported kind, or lies about its own contents.

    Args:
        message: what was found and what was expected.
        path: the file.
        offset: byte offset in the file where the trouble was met, if there is one.
        field: the header field, metadata key or tensor concerned, if there is one.
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


class RequestError(OxjaxError):
    """One request failed; the engine and the other requests are unharmed.

    Attributes:
        index: which prompt of the call failed first, where the call had several.
        results: what the other prompts of the call gave, None in the place of each failed one.
    """

    index: int | None = None
    results: tuple[object, ...] = ()


class InvalidRequestError(RequestError, ValueError):
    """A request is malformed: a bad sampling parameter, token id or prompt. Nothing was computed for it."""


class GrammarError(InvalidRequestError):
    """A grammar is malformed, unsupported or too large, or tokens are not in its language.

    Args:
        message: what was found and what was expected.
        line: line in the grammar's text, from 1, if there is one.
        column: character in that line, from 1.
    """

    def __init__(self, message: str, *, line: int | None = None, column: int | None = None):
        self.line, self.column, self.reason = line, column, message
        super().__init__(message if line is None else f"line {line}, column {column}: {message}")


class GrammarStuckError(RequestError):
    """No token continues a text inside its grammar, or finding out which ones do exceeds a limit."""


class RequestTooLargeError(RequestError):
    """A request can never fit: its prompt, or prompt and output, exceed the context or the page pool."""


class NonFiniteLogitsError(RequestError):
    """The model produced NaN or infinite logits for this request."""


class NothingLeftError(RequestError):
    """What a request forbids left no token to choose."""


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
        target: position that was asked for.
        available: positions that it can go back to, in order.
    """

    def __init__(self, target: int, available: Sequence[int]):
        self.target, self.available = target, tuple(available)
        shown = ", ".join(map(str, self.available[:20])) + (", ..." if len(self.available) > 20 else "")
        super().__init__(f"no state is kept for position {target}; there is one for {shown}")


class SnapshotError(OxjaxError):
    """A snapshot is damaged, of another version, or does not fit this engine; the engine is as it was."""


class SnapshotMismatchError(SnapshotError):
    """A snapshot comes from another model, or from the same one computed otherwise.

    Args:
        expected: fingerprint of this engine's model.
        found: fingerprint in the snapshot.
    """

    def __init__(self, expected: str, found: str):
        self.expected, self.found = expected, found
        super().__init__(
            f"the snapshot was made with the model {found}, and this engine runs {expected}: load the same file with "
            "the same dtype and exactness"
        )


class BatchError(OxjaxError):
    """A run over a file of requests cannot begin, go on or be checked; results that are there stay as they are."""


class EngineClosedError(OxjaxError):
    """The engine was closed; build a new `LLM`."""
