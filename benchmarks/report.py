"""What was measured, as a table for people and as numbers for programs."""

from __future__ import annotations

import statistics
from argparse import Namespace
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.peers import spare_tokens

OURS = "oxjax"
_UNITS = {"memory": (1e9, "GB/s"), "integer": (1e12, "TOP/s"), "float": (1e12, "TFLOP/s")}
_MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """Something to measure: `length` tokens of prompt, context or text in each of `sequences`, then `new` more."""

    work: str
    length: int
    sequences: int = 1
    new: int = 0

    @property
    def name(self) -> str:
        if self.work == "decode":
            plural = "s" if self.sequences > 1 else ""
            return f"decode, {self.sequences} sequence{plural} after {self.length}"
        return f"{self.work} {self.length}"

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences, and the tokens that each may reach."""
        spare = self.new + spare_tokens(self.sequences) if self.work == "decode" else 1
        return self.sequences, self.length + spare


@dataclass
class Line:
    """A line of the table: what each took in every round, by engine and settings: seconds (a token), or bytes."""

    name: str
    unit: str  # "tokens/s", "s" or "MiB"
    costs: dict[tuple[str, str], list[float]]
    case: Case | None = None

    @property
    def engines(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.costs))

    def best(self, engine: str) -> tuple[str, list[float]] | None:
        """The settings with the lowest median, and their costs; None where the engine was not measured."""
        found = {settings: costs for (name, settings), costs in self.costs.items() if name == engine and costs}
        return min(found.items(), key=lambda item: statistics.median(item[1])) if found else None

    def ratios(self, peer: str) -> list[float] | None:
        """Round by round: how many times as fast as a peer we are; for memory, how many times as much we take."""
        ours, theirs = self.best(OURS), self.best(peer)
        if ours is None or theirs is None:
            return None
        pairs = zip(ours[1], theirs[1], strict=True)
        return [our / their if self.unit == "MiB" else their / our for our, their in pairs]


def reached(line: Line, facts: dict[str, Any], limits: dict[str, Any]) -> tuple[str, float] | None:
    """The limit that we came nearest to, and the share of it; None where that cannot be said.

    Counted are products with weights, not those of attention, and the weights and the cache that a decoding step must
    read: so shares are rather too low.
    """
    case, ours = line.case, line.best(OURS)
    if case is None or ours is None or facts["weight_bytes"] is None:
        return None
    seconds = statistics.median(ours[1]) * case.sequences  # of a row of every sequence
    with_logits = 1 / case.length if case.work == "prefill" else 1
    operations = 2 * case.sequences * (facts["layer_weights"] + with_logits * facts["output_weights"])
    kind = "integer" if facts["integers"] and "integer" in limits else "float"
    shares = {kind: operations / seconds / limits[kind][0]}
    if case.work == "decode":
        n_bytes = facts["weight_bytes"] + case.sequences * case.length * facts["cache_bytes"]
        shares["memory"] = n_bytes / seconds / limits["memory"][0]
    return max(shares.items(), key=lambda item: item[1])


def plain(options: Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured, for `json`."""
    lines = []
    for line in found["lines"]:
        costs = [{"engine": name, "settings": s, "costs": c} for (name, s), c in line.costs.items()]
        ratios = {peer: line.ratios(peer) for peer in line.engines if peer != OURS}
        share = reached(line, found["facts"], found["limits"])
        lines.append({**asdict(line), "costs": costs, "ratios": ratios, "reached": share})
    return {"options": vars(options), **found, "lines": lines}


def render(options: Namespace, found: dict[str, Any]) -> str:
    """The table, with what it was measured on above it and what is missing from it below."""
    facts, limits = found["facts"], found["limits"]
    mode = "fast" if options.fast else "exact"
    text = [
        f"{options.model}: {facts['architecture']}, {facts['file_bytes'] / _MIB:.0f} MiB",
        f"oxjax: {mode}, weights {options.weights}, kernels {facts['kernels']}, jax {facts['jax']}",
        f"{facts['device']}, {options.threads} threads, {options.rounds} rounds, medians",
        *(f"limit, {kind}: {_rate(kind, rate)} ({way})" for kind, (rate, way) in limits.items()),
        "",
        *_table(options.peers, found),
    ]
    if options.peers:
        text += ["", "ratio: times as fast as the peer; of memory, times as much; median (least to most of the rounds)"]
    text += [f"left out: {reason}" for reason in found["left_out"]]
    for name, profile in found["profiles"].items():
        text += ["", *_profile(name, profile)]
    return "\n".join(text)


def _table(peers: list[str], found: dict[str, Any]) -> list[str]:
    rows = [["", OURS, "of the limit"]]
    for peer in peers:
        rows[0] += [peer, "ratio"]
    for line in found["lines"]:
        share = reached(line, found["facts"], found["limits"])
        row = [f"{line.name}, {line.unit}", _shown(line, OURS), f"{share[1]:.0%} {share[0]}" if share else "-"]
        for peer in peers:
            ratios = line.ratios(peer)
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-"
            row += [_shown(line, peer), spread]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))} |" for row in rows]


def _shown(line: Line, engine: str) -> str:
    found = line.best(engine)
    if found is None:
        return "-"
    settings, cost = found[0], statistics.median(found[1])
    number = {"tokens/s": 1 / cost, "s": cost, "MiB": cost / _MIB}[line.unit]
    digits = 2 if line.unit == "s" else 1 if number < 1000 else 0
    return f"{number:.{digits}f}" + (f" ({settings})" if settings else "")


def _rate(kind: str, rate: float) -> str:
    scale, unit = _UNITS[kind]
    return f"{rate / scale:.3g} {unit}"


def _profile(name: str, profile: dict[str, Any]) -> list[str]:
    whole = profile["seconds"]
    parts = ", ".join(f"{part} {profile[part] / whole:.0%}" for part in ("kernels", "xla", "host"))
    per_token = whole / profile["tokens"] * 1e3
    tops = [f"  {seconds / whole:6.1%} {operation}, {times} times" for operation, seconds, times in profile["top"]]
    return [f"{name}: {per_token:.3f} ms a token: {parts}; of operations", *tops]
