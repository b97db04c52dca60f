"""Speed of scoring multiple-choice items, beside llama.cpp, on one file, in one run.

python -m benchmarks.score --model FILE [--items 200] [--choices 4] [--context 48-96] [--continuation 2-16]

Items are random tokens: a context, and continuations of which each one's log-probability is wanted. oxjax is given all
of them and computes each context once. llama.cpp is asked through its Python binding for a context's state once, and
for the logits of all of its continuations in one batch that shares this state; NumPy makes log-probabilities of them.
It runs with and without flash attention, with a cache of float16 and of float32: what is best on some items runs them
all. Both have the same threads, and take turns in processes of their own; each round has new items.

python -m benchmarks.score --model FILE --memory 16384

Instead of that, the peak memory of a prompt of so many tokens: plain, and with the log-probability of each token.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.compare import _PAUSE, MODULES, OURS, SETTINGS, label
from benchmarks.peers.scoring import Item
from benchmarks.worker import Worker, usable_processors

PEER = "llama.cpp"
_TRIAL = 8  # items that settings are chosen on
_TOGETHER = 32  # sequences that oxjax runs at once


def items(options: argparse.Namespace, vocabulary: int, rng: np.random.Generator, n: int) -> list[Item]:
    """New ones."""

    def text(bounds: tuple[int, int]) -> list[int]:
        return rng.integers(3, vocabulary, rng.integers(bounds[0], bounds[1] + 1)).tolist()

    return [(text(options.context), [text(options.continuation) for _ in range(options.choices)]) for _ in range(n)]


def compare(options: argparse.Namespace) -> None:
    rng, threads = np.random.default_rng(options.seed), options.threads
    model = str(Path(options.model).resolve())
    longest = options.context[1] + options.continuation[1]
    given = {"model": model, "exact": not options.fast, "weights": "auto", "shapes": [(_TOGETHER, longest)]}
    with (
        Worker("benchmarks.limits", {"megabytes": 8, "width": 256}, threads) as machine,
        Worker(f"benchmarks.peers.{MODULES[OURS]}", given, threads) as ours,
        Worker(f"benchmarks.peers.{MODULES[PEER]}", {"model": model}, threads) as theirs,
    ):
        vocabulary = machine.ask("describe", model)["vocabulary"]
        trial = items(options, vocabulary, rng, _TRIAL)
        ours.ask("choose", items(options, vocabulary, rng, 2 * _TOGETHER), {})  # compiles
        found = [(theirs.ask("choose", trial, settings)[0], i) for i, settings in enumerate(SETTINGS[PEER] * 2)]
        best = SETTINGS[PEER][min(found)[1] % len(SETTINGS[PEER])]
        ratios, speeds = [], {OURS: [], PEER: []}
        differences, same = [], []
        for i in range(options.rounds):
            asked = items(options, vocabulary, rng, options.items)
            turns = [(OURS, ours, {}), (PEER, theirs, best)]
            seconds, values = {}, {}
            for name, worker, settings in turns if i % 2 else turns[::-1]:
                time.sleep(_PAUSE)
                seconds[name], values[name] = worker.ask("choose", asked, settings)
                speeds[name].append(options.items / seconds[name])
            ratios.append(seconds[PEER] / seconds[OURS])
            a, b = (np.array(values[name]) for name in (OURS, PEER))
            differences.append(np.abs(a - b).max())
            same.append((a.argmax(axis=1) == b.argmax(axis=1)).mean())
    n_tokens = sum(len(context) + sum(map(len, more)) for context, more in asked)
    print(f"{options.items} items of {options.choices} choices, {n_tokens} tokens in the last round, {threads} threads")
    for name, how in ((OURS, "fast" if options.fast else "exact"), (PEER, label(best))):
        print(f"{name:<10} {statistics.median(speeds[name]):8.2f} items/s  ({how})")
    print(
        f"ratio      {statistics.median(ratios):8.2f}  ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} rounds)"
    )
    print(f"largest difference of a log-probability {max(differences):.3g}; same choice {np.mean(same):.1%}")


def memory(options: argparse.Namespace) -> None:
    model, n = str(Path(options.model).resolve()), options.memory
    given = {"model": model, "exact": not options.fast, "weights": "auto", "shapes": [(1, n + 1)]}
    prompt = np.random.default_rng(options.seed).integers(3, 256, n).tolist()
    peaks = {}
    for work in ("prefill", "score"):
        with Worker(f"benchmarks.peers.{MODULES[OURS]}", given, options.threads) as worker:
            worker.ask(work, [prompt], 0, {})
            peaks[work] = worker.ask("peak_memory")
            print(f"{work:<8} of {n} tokens: {peaks[work] >> 20} MiB")
    print(f"ratio {peaks['score'] / peaks['prefill']:.3f}")


def _bounds(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    bounds = int(low), int(high or low)
    if not 1 <= bounds[0] <= bounds[1]:
        raise argparse.ArgumentTypeError(f"{text}: expected two numbers from 1 on, as 48-96")
    return bounds


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="a GGUF file; benchmarks/random_model.py writes some of real shapes")
    add("--items", type=int, default=200)
    add("--choices", type=int, default=4)
    add("--context", type=_bounds, default=(48, 96), help="least and most tokens")
    add("--continuation", type=_bounds, default=(2, 16), help="likewise")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=usable_processors())
    add("--fast", action="store_true", help="oxjax in fast mode instead of exact")
    add("--memory", type=int, metavar="TOKENS", help="measure the memory of a prompt instead")
    add("--seed", type=int, default=0, help="of the tokens")
    options = parser.parse_args(arguments)
    if not Path(options.model).exists():
        sys.exit(f"benchmarks.score: {options.model} does not exist")
    memory(options) if options.memory else compare(options)


if __name__ == "__main__":
    main()
