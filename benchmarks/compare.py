"""Speed and memory of oxjax beside other engines, on one file, in one run.

python -m benchmarks.compare --model FILE [--peers llama.cpp,transformers] [--only prefill,decode] [--json OUT]

All engines run with the same number of threads, each in a process of its own, and take turns, so that a machine that
slows down slows all of them. Every round has prompts of its own, so that no prefix is found. A ratio is taken within a
round; the median of all rounds is printed, with the smallest and the largest. llama.cpp runs with and without flash
attention, with a cache of float16 and of float32, and counts with what is best for each line. Beside them stand the
limits of the machine, measured in the same run, and the share of them that oxjax reaches.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.report import OURS, Case, Line
from benchmarks.worker import Worker, WorkerError, usable_processors

_LLAMA_CPP = [{"flash": flash, "cache": cache} for flash in (False, True) for cache in ("f16", "f32")]
SETTINGS: dict[str, list[dict[str, Any]]] = {OURS: [{}], "llama.cpp": _LLAMA_CPP, "transformers": [{}]}
MODULES = {OURS: "oxjax", "llama.cpp": "llama_cpp", "transformers": "transformers"}
NO_FILE = {"transformers"}  # makes random weights of the file's shape, so its start-up says nothing
WORKS = ("prefill", "decode", "score", "start-up", "memory")
_PAUSE = 0.02  # seconds, until threads of who ran last no longer spin for more work
_FIRST_PROMPT = 16  # tokens of the prompt whose first token ends the start-up


def entrants(peers: Iterable[str]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, settings) for name in (OURS, *peers) for settings in SETTINGS[name]]


def label(settings: dict[str, Any]) -> str:
    """Settings in a few words."""
    return f"{settings['cache']} cache, flash {'on' if settings['flash'] else 'off'}" if settings else ""


class Comparison:
    """One run: its workers, its plan and its rounds."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.rng = options, np.random.default_rng(options.seed)
        self.model = str(Path(options.model).resolve())
        self.entrants = entrants(options.peers)

    def run(self) -> dict[str, Any]:
        options, profiles = self.options, {}
        lines: list[Line] = []
        with ExitStack() as stack:
            sizes = {"megabytes": options.stream_megabytes, "width": options.product_width}
            machine = stack.enter_context(Worker("benchmarks.limits", sizes, options.threads))
            self.facts = machine.ask("describe", self.model)
            cases, left_out = self._plan()
            limits = [machine.ask("measure")]
            if cases:
                workers = {name: stack.enter_context(self._worker(name, cases)) for name in (OURS, *options.peers)}
                self.facts |= workers[OURS].ask("facts")
                for case in cases:
                    _say(case.name)
                    lines.append(self._measure(case, workers))
                if options.profile:
                    _say("profiles")
                    profiles = {c.name: workers[OURS].ask("profile", c.work, self._prompts(c), c.new) for c in cases}
            limits.append(machine.ask("measure"))
        fresh = Case("decode", options.text, 1, options.new)
        for work in ("start-up", "memory"):
            if work in options.only and (reason := self._obstacle(fresh)):
                left_out.append(f"{work}: {reason}")
            elif work in options.only:
                lines += self._start_up(fresh) if work == "start-up" else self._peak_memory(fresh)
        best = {kind: max(found[kind] for found in limits) for kind in limits[0]}
        return {"facts": self.facts, "limits": best, "lines": lines, "profiles": profiles, "left_out": left_out}

    def _plan(self) -> tuple[list[Case], list[str]]:
        """What can be measured, and why the rest cannot."""
        options = self.options
        wanted = [Case("prefill", length) for length in options.prompts]
        wanted += [Case("decode", length, n, options.new) for length in options.contexts for n in options.sequences]
        wanted.append(Case("score", options.text))
        reasons = {case: self._obstacle(case) for case in wanted if case.work in options.only}
        left_out = [f"{case.name}: {reason}" for case, reason in reasons.items() if reason]
        return [case for case, reason in reasons.items() if not reason], left_out

    def _obstacle(self, case: Case) -> str | None:
        """Why something cannot be measured."""
        facts, (n, length) = self.facts, case.shape
        if length > facts["context"]:
            return f"needs {length} tokens, the model has a context of {facts['context']}"
        room = max(0, facts["memory"] - 4 * facts["file_bytes"])  # each engine has its own form of the weights
        need = 2 * n * length * facts["cache_bytes"]  # ours, and that of the one whose turn it is
        return f"two caches take {need >> 20} MiB, {room >> 20} MiB are free" if need > room else None

    def _worker(self, name: str, cases: list[Case], environment: dict[str, str] | None = None) -> Worker:
        given: dict[str, Any] = {"model": self.model}
        if name == OURS:
            shapes = [case.shape for case in cases]
            given |= {"exact": not self.options.fast, "weights": self.options.weights, "shapes": shapes}
        return Worker(f"benchmarks.peers.{MODULES[name]}", given, self.options.threads, environment)

    def _prompts(self, case: Case) -> list[list[int]]:
        """New ones."""
        first = min(3, self.facts["vocabulary"] - 1)  # the ids before it are often special
        return self.rng.integers(first, self.facts["vocabulary"], (case.sequences, case.length)).tolist()

    def _turns(self) -> Iterator[tuple[int, list[tuple[str, dict[str, Any]]]]]:
        """Rounds and who runs when: another one goes first each time. The first round compiles and does not count."""
        for i in range(self.options.rounds + 1):
            first = i % len(self.entrants)
            yield i, self.entrants[first:] + self.entrants[:first]

    def _measure(self, case: Case, workers: dict[str, Worker]) -> Line:
        costs = self._no_costs()
        for i, order in self._turns():
            prompts = self._prompts(case)
            for name, settings in order:
                time.sleep(_PAUSE)
                seconds, tokens = workers[name].ask(case.work, prompts, case.new, settings)
                if i:
                    costs[name, label(settings)].append(seconds / tokens)
        return Line(case.name, "tokens/s", costs, case)

    def _start_up(self, case: Case) -> list[Line]:
        """Seconds from the start of a process to its first token, for us also where nothing was compiled before."""
        cold, warm = (Line(name, "s", self._no_costs()) for name in ("start-up, nothing compiled", "start-up"))
        for i, order in self._turns():
            _say(f"start-up, round {i} of {self.options.rounds}")
            for name, settings in (entrant for entrant in order if entrant[0] not in NO_FILE):
                seconds = self._first_token(name, settings, case)
                with tempfile.TemporaryDirectory() as empty:
                    programs = {"JAX_COMPILATION_CACHE_DIR": empty}
                    without = self._first_token(name, settings, case, programs) if name == OURS else seconds
                if i:
                    warm.costs[name, label(settings)].append(seconds)
                    cold.costs[name, label(settings)].append(without)
        return [cold, warm]

    def _first_token(
        self, name: str, settings: dict[str, Any], case: Case, environment: dict[str, str] | None = None
    ) -> float:
        prompts = self._prompts(Case("prefill", _FIRST_PROMPT))
        start = time.perf_counter()
        with self._worker(name, [case], environment) as worker:
            worker.ask("first_token", prompts, settings)
            return time.perf_counter() - start

    def _peak_memory(self, case: Case) -> list[Line]:
        """Peak bytes of a process that computes a prompt and some tokens; mapped pages of the file count."""
        line = Line(f"peak memory, prompt of {case.length}", "MiB", self._no_costs())
        for i, order in self._turns():
            _say(f"memory, round {i} of {self.options.rounds}")
            for name, settings in order:
                with self._worker(name, [case]) as worker:
                    worker.ask("decode", self._prompts(case), case.new, settings)
                    if i:
                        line.costs[name, label(settings)].append(worker.ask("peak_memory"))
        return [line]

    def _no_costs(self) -> dict[tuple[str, str], list[float]]:
        return {(name, label(settings)): [] for name, settings in self.entrants}


def _say(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected numbers from 1 on")
    return numbers


def _number(text: str) -> int:
    return _numbers(text)[0]


def _chosen(names: Iterable[str]) -> Any:
    """Parser of some of these names, separated by commas."""

    def parse(text: str) -> list[str]:
        found = list(dict.fromkeys(filter(None, text.split(","))))
        if unknown := [name for name in found if name not in names]:
            raise argparse.ArgumentTypeError(f"{unknown[0]} is not one of {', '.join(names)}")
        return found

    return parse


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, peers = parser.add_argument, [name for name in SETTINGS if name != OURS]
    add("--model", required=True, help="a GGUF file; benchmarks/random_model.py writes some of real shapes")
    add("--peers", type=_chosen(peers), default=["llama.cpp"], help="default llama.cpp; '' for none")
    add("--only", type=_chosen(WORKS), default=list(WORKS), help=f"some of {','.join(WORKS)}")
    add("--prompts", type=_numbers, default=[128, 512, 2048], help="tokens to prefill")
    add("--sequences", type=_numbers, default=[1, 4, 8, 16, 32], help="that decode together")
    add("--contexts", type=_numbers, default=[128, 1024], help="tokens that are there before decoding")
    add("--new", type=_number, default=32, help="tokens to decode in each sequence")
    add("--text", type=_number, default=512, help="tokens to score, and of the prompt whose peak memory is taken")
    add("--rounds", type=_number, default=5)
    add("--threads", type=_number, default=usable_processors())
    add("--weights", default="auto", help="of oxjax: auto, file, float32 or bfloat16")
    add("--fast", action="store_true", help="oxjax in fast mode instead of exact")
    add("--profile", action="store_true", help="where the time of oxjax goes: native kernels, XLA, host")
    add("--json", metavar="OUT", help="write every number to a file")
    add("--seed", type=int, default=0, help="of the prompts")
    add("--stream-megabytes", type=_number, default=512, help="to read for the bandwidth of the memory")
    add("--product-width", type=_number, default=2048, help="of the matrices for the peak of products")
    options = parser.parse_args(arguments)
    if not Path(options.model).exists():
        parser.error(f"{options.model} does not exist")
    if options.threads > usable_processors():
        parser.error(f"{options.threads} threads: this process may use {usable_processors()} processors")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    try:
        found = Comparison(options).run()
    except WorkerError as error:
        sys.exit(f"benchmarks.compare: {error}")
    print(report.render(options, found))
    if options.json:
        Path(options.json).write_text(json.dumps(report.plain(options, found), indent=1))


if __name__ == "__main__":
    main()
