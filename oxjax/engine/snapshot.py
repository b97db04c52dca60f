"""Requests of an engine as bytes, and back: what a snapshot holds, and how one is checked before it is believed.

A snapshot is a safetensors file (https://github.com/huggingface/safetensors#format). Its arrays hold the requests
one after the other: `tokens`; `logprobs`, `ranks`, `mus`, `top_counts`, `top_tokens` and `top_logprobs` of what was
generated, 0 and NaN where there is no rank and no mu; `logits` of prompts that are scored; `state.*`, the keys and
values of computed tokens, without regard to pages; and `slot.*`, the recurrent state after them.
Its metadata holds a JSON header: format, version, fingerprint of the model, the counts and parameters of each
request, and a checksum of all other bytes of the file. Draws depend on seed and position alone, text and repetitions on
tokens alone, so none of them leaves a state to be kept; mirostat's are the `mus`.

The checksum finds damage, not malice: resume snapshots that you trust.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Callable
from hashlib import blake2b
from itertools import accumulate, pairwise
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save as to_safetensors

from oxjax.cache.states import SwappedState
from oxjax.cache.transfer import page_arrays, slot_arrays
from oxjax.config import ModelConfig
from oxjax.constrain import Grammar
from oxjax.constrain.matcher import Matcher
from oxjax.engine.output import Chunk, Output
from oxjax.engine.scheduler import Sequence
from oxjax.errors import RequestError, SnapshotError, SnapshotMismatchError, TokenizerError
from oxjax.sampling.edits import edits_of
from oxjax.sampling.packing import SamplingMetadata
from oxjax.sampling.params import SamplingParams
from oxjax.tokenizer import Tokenizer

FORMAT, VERSION = "oxjax snapshot", 4
_KEY = "oxjax"  # of the header among the metadata
_NO_CHECKSUM = "0" * 64
_DTYPE_NAMES = {"int32": "I32", "float32": "F32", "float64": "F64", "bfloat16": "BF16"}
_MOST = 2**31 - 1

Specs = list[tuple[np.dtype, tuple[int, ...]]]


class Host(NamedTuple):
    """Facts about an engine that its snapshots depend on.

    Attributes:
        fingerprint: what `model_fingerprint` gave.
        vocab_size: columns of logits; token ids are below.
        tokenizer: turns tokens into text.
        matcher: gives what follows the grammar of some parameters, if they have one.
        rows: dtype and shape of a token's row in each page array, in the order of the state's leaves.
        values: dtype and shape of a sequence's value in each slot array, likewise.
    """

    fingerprint: str
    vocab_size: int
    tokenizer: Tokenizer
    matcher: Callable[[SamplingParams], Matcher | None]
    rows: Specs
    values: Specs


class Entry(NamedTuple):
    """A request that is not done; see `Request` for its fields."""

    sequence: Sequence
    params: SamplingParams | None
    seed: int
    output: Output | None
    metadata: SamplingMetadata | None
    logits: list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Counts:
    """A request in the header: how many rows of the arrays are its own, and what it asked for."""

    n_tokens: int
    n_prompt: int
    n_computed: int
    n_states: int
    n_logits: int
    n_top: int
    max_length: int
    priority: int
    seed: int
    params: dict[str, Any] | None

    @property
    def n_new(self) -> int:
        return self.n_tokens - self.n_prompt


def model_fingerprint(config: ModelConfig, params: Any) -> str:
    """Names a model by its content, config and every parameter, to the bit, and by how it is computed.

    Reads some 1 GB a second.
    """
    digest = blake2b(repr(config).encode(), digest_size=16, person=b"oxjax model")
    digest.update(str(jax.tree.structure(params)).encode())  # the formats of quantised weights are part of it
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    kind = f"{config.dtype} {'exact' if config.numerics.exact else 'fast'} {config.numerics.backend}"
    return f"{config.architecture} {kind} {digest.hexdigest()}"


def state_specs(state: Any) -> tuple[Specs, Specs]:
    """`Host.rows` and `Host.values` of an engine's state."""
    rows = [(np.dtype(a.dtype), tuple(a.shape[2:])) for a in page_arrays(state)]
    return rows, [(np.dtype(a.dtype), tuple(a.shape[1:])) for a in slot_arrays(state)]


def _layout(host: Host) -> dict[str, tuple[str, np.dtype, tuple[int, ...]]]:
    """The arrays of a snapshot: which count gives a request's rows, the dtype, and the shape of a row."""
    return {
        "tokens": ("n_tokens", np.dtype(np.int32), ()),
        "logprobs": ("n_new", np.dtype(np.float64), ()),
        "ranks": ("n_new", np.dtype(np.int32), ()),
        "mus": ("n_new", np.dtype(np.float64), ()),
        "top_counts": ("n_new", np.dtype(np.int32), ()),
        "top_tokens": ("n_top", np.dtype(np.int32), ()),
        "top_logprobs": ("n_top", np.dtype(np.float64), ()),
        "logits": ("n_logits", np.dtype(np.float32), (host.vocab_size,)),
        **{f"state.{i}": ("n_computed", *spec) for i, spec in enumerate(host.rows)},
        **{f"slot.{i}": ("n_states", *spec) for i, spec in enumerate(host.values)},
    }


def encode(host: Host, entries: list[Entry], swapped: list[SwappedState | None]) -> bytes:
    """The snapshot of requests.

    Args:
        host: of the engine they are in.
        entries: the requests, oldest first.
        swapped: their state; None for those that have none.
    """
    columns = [_columns(*pair) for pair in zip(entries, swapped, strict=True)]
    tensors = {
        name: np.concatenate(
            [np.zeros((0, *row), dtype), *(np.asarray(c[name], dtype) for c in columns if len(c.get(name, ())))]
        )
        for name, (_, dtype, row) in _layout(host).items()
    }
    requests = [dataclasses.asdict(_counts(*pair)) for pair in zip(entries, swapped, strict=True)]
    return pack({"fingerprint": host.fingerprint, "requests": requests}, tensors)


def _columns(entry: Entry, swapped: SwappedState | None) -> dict[str, list | np.ndarray]:
    """A request's rows of every array that it has any of."""
    chunks = entry.output.chunks if entry.output is not None else []
    top = [pair for chunk in chunks for pair in chunk.top_logprobs]
    return {
        "tokens": entry.sequence.tokens,
        "logprobs": [chunk.logprob for chunk in chunks],
        "ranks": [chunk.rank or 0 for chunk in chunks],
        "mus": [math.nan if chunk.mu is None else chunk.mu for chunk in chunks],
        "top_counts": [len(chunk.top_logprobs) for chunk in chunks],
        "top_tokens": [token for token, _ in top],
        "top_logprobs": [logprob for _, logprob in top],
        "logits": np.concatenate(entry.logits) if entry.logits else [],
        **({f"state.{i}": rows for i, rows in enumerate(swapped.rows)} if swapped else {}),
        **({f"slot.{i}": value[None] for i, value in enumerate(swapped.values)} if swapped else {}),
    }


def _counts(entry: Entry, swapped: SwappedState | None) -> _Counts:
    chunks = entry.output.chunks if entry.output is not None else []
    n_tokens = len(entry.sequence.tokens)
    return _Counts(
        n_tokens=n_tokens,
        n_prompt=n_tokens - len(chunks),
        n_computed=swapped.n_tokens if swapped else 0,
        n_states=int(bool(swapped and swapped.values)),
        n_logits=sum(map(len, entry.logits)),
        n_top=sum(len(chunk.top_logprobs) for chunk in chunks),
        max_length=entry.sequence.max_length,
        priority=entry.sequence.priority,
        seed=int(entry.seed),
        params=None if entry.params is None else dataclasses.asdict(entry.params),
    )


def decode(host: Host, blob: bytes, check: Callable[[Sequence], None]) -> list[Entry]:
    """The requests of a snapshot. Nothing that the blob claims makes this allocate more than its own size.

    Args:
        host: of the engine they are for.
        blob: what `encode` gave.
        check: raises RequestTooLargeError for a sequence that can never run there.

    Raises:
        SnapshotMismatchError: another model, dtype, exactness or backend.
        SnapshotError: damaged, of another version, inconsistent, or a request does not fit.
    """
    header = _header(blob)
    if header.get("fingerprint") != host.fingerprint:
        raise SnapshotMismatchError(host.fingerprint, str(header.get("fingerprint"))[:100])
    if not isinstance(header.get("requests"), list):
        raise SnapshotError("the snapshot's header has no list of requests")
    requests = [_read_counts(i, raw) for i, raw in enumerate(header["requests"])]
    layout, expected, parts = _layout(host), {}, {}
    for name, (count, dtype, row) in layout.items():
        expected[name] = dtype, (sum(getattr(r, count) for r in requests), *row)
    for name, array in _read_tensors(blob, expected).items():
        bounds = accumulate((getattr(r, layout[name][0]) for r in requests), initial=0)
        parts[name] = [array[start:stop] for start, stop in pairwise(bounds)]
    entries = []
    for i, counts in enumerate(requests):
        try:
            entries.append(_entry(host, counts, {name: part[i] for name, part in parts.items()}))
            check(entries[-1].sequence)
        except (SnapshotError, RequestError, TokenizerError) as error:
            raise SnapshotError(f"request {i} of the snapshot: {error}") from error
    return entries


def _entry(host: Host, counts: _Counts, parts: dict[str, np.ndarray]) -> Entry:
    for name in ("tokens", "top_tokens"):
        ids = parts[name]
        if ids.size and not 0 <= ids.min() <= ids.max() < host.vocab_size:
            raise SnapshotError(f"{name} from {ids.min()} to {ids.max()}: the vocabulary has {host.vocab_size}")
    if counts.n_states != int(counts.n_computed > 0 and bool(host.values)):
        raise SnapshotError(f"{counts.n_states} recurrent states for {counts.n_computed} computed tokens")
    rows = [parts[f"state.{i}"] for i in range(len(host.rows))]
    values = [parts[f"slot.{i}"][0] for i in range(len(host.values))] if counts.n_states else []
    sequence = Sequence(
        tokens=parts["tokens"].tolist(),
        max_length=counts.max_length,
        output_kind="logits" if counts.params is None else None,
        next_output_row=counts.n_logits,
        priority=counts.priority,
        swapped=SwappedState(counts.n_computed, rows, values) if counts.n_computed else None,
    )
    logits = [parts["logits"]] if counts.n_logits else []
    if counts.params is None:
        return Entry(sequence, None, counts.seed, None, None, logits)
    params = _read_params(counts.params)
    if params.max_tokens not in (None, counts.max_length - counts.n_prompt):
        raise SnapshotError(
            f"max_tokens {params.max_tokens} after {counts.n_prompt} tokens of prompt, and a length of "
            f"{counts.max_length} at the most"
        )
    edits = edits_of(params, host.tokenizer.eog_ids, counts.n_prompt, host.vocab_size)
    output = _replay(host, counts, params, parts)
    metadata = SamplingMetadata(params, counts.seed, edits)
    return Entry(sequence, params, counts.seed, output, metadata, logits)


def _replay(host: Host, counts: _Counts, params: SamplingParams, parts: dict[str, np.ndarray]) -> Output:
    """The output as it was when it had been given these tokens."""
    prompt, new = np.split(parts["tokens"], [counts.n_prompt])
    max_new = counts.max_length - counts.n_prompt
    output = Output(host.tokenizer, prompt.tolist(), params, max_new, host.matcher(params))
    n_top = parts["top_counts"]
    if (n_top < 0).any() or n_top.sum() != counts.n_top:  # of a fork's parent there may be more than it asks for
        raise SnapshotError(f"top_counts do not add up to {counts.n_top}, or are below 0")
    if np.isinf(parts["mus"]).any():
        raise SnapshotError("a mu of mirostat is infinite")
    pairs = zip(parts["top_tokens"].tolist(), parts["top_logprobs"].tolist(), strict=True)
    ranks = [rank or None for rank in parts["ranks"].tolist()]
    mus = [None if math.isnan(mu) else mu for mu in parts["mus"].tolist()]
    rows = zip(new.tolist(), parts["logprobs"].tolist(), n_top.tolist(), ranks, mus, strict=True)
    return output.replay(
        Chunk(token, logprob, tuple(next(pairs) for _ in range(n)), "", rank=rank, mu=mu)
        for token, logprob, n, rank, mu in rows
    )


def _read_counts(i: int, raw: object) -> _Counts:
    """A request of the header, once its counts make sense together."""
    names = {field.name for field in dataclasses.fields(_Counts)}
    if not isinstance(raw, dict) or set(raw) != names or not isinstance(raw["params"], dict | None):
        raise SnapshotError(f"request {i} of the snapshot: expected {', '.join(sorted(names))}")
    n_tokens, scored = raw["n_tokens"], raw["params"] is None
    _whole(i, raw, "n_tokens", 1, _MOST)
    _whole(i, raw, "n_prompt", n_tokens if scored else 1, n_tokens)
    _whole(i, raw, "n_computed", 0, n_tokens - 1)
    _whole(i, raw, "n_states", 0, 1)
    _whole(i, raw, "priority", -_MOST, _MOST)
    # Rows of logits are at least those of the pages: after a preemption there are more.
    _whole(i, raw, "n_logits", *((raw["n_computed"], n_tokens - 1) if scored else (0, 0)))
    _whole(i, raw, "n_top", 0, 0 if scored else _MOST)
    _whole(i, raw, "max_length", *((n_tokens, n_tokens) if scored else (n_tokens + 1, _MOST)))
    _whole(i, raw, "seed", 0, 2**64 - 1)
    return _Counts(**raw)


def _whole(i: int, raw: dict[str, Any], name: str, least: int, most: int) -> None:
    value = raw[name]
    if type(value) is not int or not least <= value <= most:
        found = repr(value)[:40]
        raise SnapshotError(f"request {i} of the snapshot: {name} {found}, expected a whole number {least} to {most}")


def _read_params(raw: dict[str, Any]) -> SamplingParams:
    real, optional = (int, float), (int, NoneType)
    kinds: dict[str, tuple[type, ...]] = {field.name: (int,) for field in dataclasses.fields(SamplingParams)}
    reals = [f.name for f in dataclasses.fields(SamplingParams) if isinstance(f.default, float)]
    kinds |= dict.fromkeys(reals, real) | dict.fromkeys(("max_tokens", "seed", "penalty_window"), optional)
    texts = [f.name for f in dataclasses.fields(SamplingParams) if isinstance(f.default, str)]
    kinds |= dict.fromkeys(("dry_window", "best_of", "prompt_logprobs"), optional) | dict.fromkeys(texts, (str,))
    kinds["grammar"] = (dict, NoneType)
    lists = [f.name for f in dataclasses.fields(SamplingParams) if isinstance(f.default, tuple)]
    kinds |= {"ignore_eos": (bool,)} | dict.fromkeys(lists, (list,))
    if set(raw) != set(kinds):
        raise SnapshotError(f"sampling parameters {', '.join(sorted(raw))[:200]}: expected {', '.join(sorted(kinds))}")
    for name, value in raw.items():
        if type(value) not in kinds[name]:
            raise SnapshotError(
                f"{name} is {type(value).__name__}, expected {' or '.join(k.__name__ for k in kinds[name])}"
            )
    grammar = raw["grammar"]
    if grammar is not None:
        if set(grammar) != {"kind", "source"}:
            raise SnapshotError(f"a grammar with {', '.join(sorted(grammar))[:100]}: expected kind and source")
        grammar = Grammar(**grammar)
    return SamplingParams(**{**raw, "grammar": grammar})


def pack(header: dict[str, Any], tensors: dict[str, np.ndarray]) -> bytes:
    """A snapshot file of a header and arrays, with format, version and checksum."""
    # Sorted, so that the checksum is the first thing in the header that can look like one.
    text = json.dumps(
        {**header, "format": FORMAT, "version": VERSION, "checksum": _NO_CHECKSUM},
        sort_keys=True,
        allow_nan=False,
        default=_plain,
    )
    blob = memoryview(to_safetensors(tensors, {_KEY: text}))
    at = bytes(blob[: 8 + _header_length(blob)]).index(_NO_CHECKSUM.encode())
    return b"".join([blob[:at], _checksum(blob, at).encode(), blob[at + len(_NO_CHECKSUM) :]])


def _plain(number: Any) -> float | int | bool:
    """A number of another type as Python's own."""
    return number.item() if isinstance(number, np.generic) else float(number)


def _header_length(blob: bytes | memoryview) -> int:
    return int.from_bytes(blob[:8], "little")


def _checksum(blob: bytes | memoryview, at: int) -> str:
    """Checksum of all bytes but its own, which are at `at`."""
    digest, view = blake2b(digest_size=len(_NO_CHECKSUM) // 2, person=b"oxjax snapshot"), memoryview(blob)
    for piece in (view[:at], _NO_CHECKSUM.encode(), view[at + len(_NO_CHECKSUM) :]):
        digest.update(piece)
    return digest.hexdigest()


def _header(blob: bytes) -> dict[str, Any]:
    """The header of a snapshot of our version whose bytes are all as they were written."""
    head = bytes(blob[: 8 + _header_length(blob)])
    try:
        header = json.loads(json.loads(head[8:])["__metadata__"][_KEY], parse_constant=_no_constant)
        kind, version, checksum = header["format"], header["version"], header["checksum"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise SnapshotError(f"{len(blob)} bytes that are not a snapshot of oxjax, or a damaged one") from error
    if kind != FORMAT or type(version) is not int or version != VERSION:
        found = f"{kind!r:.40} version {version!r:.40}"
        raise SnapshotError(f"the snapshot is {found}, and this oxjax reads {FORMAT!r} version {VERSION}")
    at = head.find(checksum.encode()) if isinstance(checksum, str) and len(checksum) == len(_NO_CHECKSUM) else -1
    if at < 0 or _checksum(blob, at) != checksum:
        raise SnapshotError("the snapshot is damaged: its bytes do not have the checksum that it names")
    return header


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} in the header")


def _read_tensors(blob: bytes, expected: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    try:
        found = dict(deserialize(blob))
    except SafetensorError as error:
        raise SnapshotError(f"the snapshot is not a safetensors file: {error}") from error
    if set(found) != set(expected):
        raise SnapshotError(f"the snapshot has arrays {sorted(found)}, expected {sorted(expected)}"[:400])
    arrays = {}
    for name, (dtype, shape) in expected.items():
        kind = found[name]["dtype"], tuple(found[name]["shape"])
        if kind != (_DTYPE_NAMES[dtype.name], shape):
            raise SnapshotError(f"array {name} of the snapshot is {kind}, expected {_DTYPE_NAMES[dtype.name], shape}")
        arrays[name] = np.frombuffer(found[name]["data"], dtype).reshape(shape)
    return arrays


def save(path: str | os.PathLike[str], blob: bytes) -> None:
    """Write a file so that at every moment there is the whole old one or the whole new one.

    Raises:
        OSError: it could not be written; an old file is as it was.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
