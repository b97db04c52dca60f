"""Compare every stage of sampling with llama.cpp's, and those that it lacks with their definitions in float64.

python tools/sampler_parity.py [--vectors 9000]

A line for each stage: how many vectors of logits (random ones, ties, forbidden tokens, one survivor, all or nearly
equal, one far ahead, tiny and huge scales); the share after which the same tokens are left; the share that is alike,
where as many are left with the same logits, as it is open which of equal tokens goes; the largest difference of a
renormalised probability after either; and what differs by design. Fails where a stage is out of tolerance. Needs
llama.cpp (the `oracle` extra).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from oxjax.assets import embedded_model  # noqa: E402
from tests.helpers.grammar_walks import GRAMMARS, compared  # noqa: E402  (the paths come first)
from tests.helpers.sampler_cases import (  # noqa: E402
    STAGE_CASES,
    Agreement,
    agreement,
    biases,
    mirostat,
    penalties,
    repetitions,
    stage,
)

LEAST_ALIKE, MOST_DIFFERENT = 0.995, 1e-4  # logits of ten thousand round by a thousandth there
STEPS = 12  # tokens of a walk through a grammar

_TIES = "which of equal tokens goes is open there; here the higher ids go"
NOTES = {
    "DRY": "what overflows forbids there and stays finite here; here breakers are found across tokens too",
    "temperature": "here the largest is subtracted first where the temperature is near 0, so that none overflows",
    "dynamic temperature": "NaN there with forbidden tokens or a temperature near 0: left out",
    "top_k": _TIES,
    "typical_p": f"NaN there with probabilities of 0: left out; {_TIES}",
    "top_p": _TIES,
    "xtc": "which of equal tokens stays is open there; here the highest id",
    "mirostat 1": "its fit is NaN there with forbidden tokens, its k overflows on flat rows: left out",
    "mirostat 2": "where nothing is likely enough, one of equals stays there, all of them here: left out",
    "grammar": "there control tokens are text, and bytes need not be UTF-8; counted as the same",
}


class Line(NamedTuple):
    """A stage, and how to compare so many vectors."""

    name: str
    measure: Callable[[int], Agreement]
    against: str = "llama.cpp"


def masks(n: int) -> Agreement:
    """Of grammars along random walks, on random logits; the same but for differences that are wanted."""
    rng, seeds = np.random.default_rng(4), range(-(-n // (STEPS * len(GRAMMARS))))
    agreed, sides = [], []
    for ours, theirs, unwanted in compared(Path(embedded_model()), GRAMMARS, seeds, STEPS):
        agreed.append(not unwanted)
        logits = rng.normal(size=len(ours)) * 4
        sides.append([np.where(ours, logits, -np.inf), np.where(ours if agreed[-1] else theirs, logits, -np.inf)])
    found = agreement(*map(np.stack, zip(*sides, strict=True)))
    return found._replace(same=np.mean(agreed))


def lines() -> list[Line]:
    """All stages, in the order in which they act."""
    before = [
        Line("logit bias", lambda n: agreement(*biases(n))),
        Line("penalties", lambda n: agreement(*penalties(n))),
        Line("DRY", lambda n: agreement(*repetitions(n))),
        Line("grammar", masks),
    ]
    between = [
        Line(
            name,
            lambda n, name=name, case=case: agreement(*stage(name, n), case.rtol),
            "llama.cpp" if case.sampler else "float64",
        )
        for name, case in STAGE_CASES.items()
    ]
    last = [Line(f"mirostat {v}", lambda n, v=v: agreement(*mirostat(v, n))) for v in (1, 2)]
    return before + between + last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=9000, help="of every stage, about")
    n = parser.parse_args().vectors
    print("| stage | against | vectors | same | alike | difference | differs by design |\n|" + " --- |" * 7, flush=True)
    wrong = []
    for name, measure, against in lines():
        found = measure(n)
        if found.alike < LEAST_ALIKE or not found.worst <= MOST_DIFFERENT:
            wrong.append(name)
        shares = f"{found.same:.3%} | {found.alike:.3%}"
        print(
            f"| {name} | {against} | {found.rows} | {shares} | {found.worst:.1e} | {NOTES.get(name, '')} |", flush=True
        )
    if wrong:
        sys.exit(f"out of tolerance: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
