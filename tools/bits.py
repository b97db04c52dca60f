"""Hashes of the bits of a fixed set of requests, to show that a change of the code left them alone.

python tools/bits.py [--against REV|FILE] [--only TEXT] [--json OUT] [--shapes]

Every request gives a SHA-256 over its token ids and the bits of its log-probabilities (or of its scores, logits or
embeddings). A name says where it ran: `model/mode,backend,activations/request`. Bits belong to a machine, so
`--against` runs the other revision's own copy of this file from a worktree on this one, and compares; FILE is what
`--json` wrote. It exits with 1 if an exact hash of the native backend differs or a name is missing; differences of fast
and XLA runs, which a changelog entry may allow, are listed and exit with 2. `--shapes` hashes some models in engines of
other sizes, none of which may change a bit: pages, rows of a step, decode steps of a call, threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's package, and its tests' writer of random models
DATA = Path(os.environ.get("OXJAX_TEST_DATA", ROOT.parent / "shared" / "data"))
TRAINED = {"embedded": None, "stories260K": "models/stories260K/stories260K.gguf"}
FILES = {
    "Q4_K_M": "quants/llama-mix-Q4_K_M.gguf",
    "attention": "archs/qwen3.gguf",
    "window": "archs/gemma3.gguf",
    "sinks and experts": "archs/gptoss.gguf",
    "MLA": "archs/deepseek2_mla.gguf",
    "mamba": "archs/mamba.gguf",
    "mamba2": "archs/mamba2.gguf",
    "delta net": "archs/qwen3next.gguf",
    "qwen35": "archs/qwen35.gguf",
    "hybrid": "archs/falconh1.gguf",
    "jamba": "archs/jamba.gguf",
}
SYNTHETIC = ("rwkv6", "rwkv7", "kimi-linear", "lfm2", "plamo2")
ENCODERS = {"bert": "archs/bert.gguf", "nomic-bert": "archs/nomicbert.gguf"}
# (exact, backend, activations); those of every model, and those of trained and quantised ones besides.
EVERYWHERE = [(True, "native", "int8"), (False, "native", "int8"), (True, "xla", "float32")]
BESIDES = [(True, "native", "float32"), (False, "native", "float32"), (False, "xla", "float32")]

SHAPED = ("embedded", "MLA", "mamba2", "delta net", "hybrid")
SHAPES: list[dict[str, int]] = [
    *({"page_size": n} for n in (16, 128)),
    *({"max_rows": n} for n in (16, 64, 512)),
    {"steps_per_call": 1},
    *({"threads": n} for n in (1, 2)),
]

PROMPTS = ["Once upon a time, there was a little", "The dog", "Lily and Tom went to the park. They saw a big tree."]
IDS = [np.random.default_rng(i).integers(3, 500, 20 + 7 * i).tolist() for i in range(3)]
STAGES = {
    "temperature": 0.9,
    "temperature_range": 0.2,
    "top_k": 50,
    "typical_p": 0.98,
    "top_p": 0.95,
    "min_p": 0.01,
    "top_a": 0.01,
    "epsilon_cutoff": 0.001,
    "eta_cutoff": 0.001,
    "top_n_sigma": 4.0,
    "xtc_probability": 0.3,
    "mirostat": 2,
    "mirostat_tau": 1.5,
    "logit_bias": {60: 2.0, 300: -1.5, 301: 3.25},
    "banned_tokens": (70, 310),
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.2,
    "penalty_window": 20,
    "dry_multiplier": 0.8,
    "dry_allowed_length": 1,
    "min_tokens": 8,
}


def digest(*parts: Any) -> str:
    """SHA-256 over arrays, and over numbers and texts as JSON; floats by their bits."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.tobytes() if isinstance(part, np.ndarray) else json.dumps(part, default=str).encode())
    return found.hexdigest()


def of_results(results: list[Any]) -> str:
    """The bits of results of `generate`, with their other samples."""
    parts: list[Any] = []
    for result in results:
        prompt = [dataclasses.astuple(s) if s else None for s in result.prompt_logprobs or ()]
        for r in (result, *result.others):
            parts += [r.token_ids, [x.hex() for x in r.logprobs], r.top_logprobs, r.ranks, r.score, r.seed, prompt]
    return digest(*parts)


def generating(llm: Any, prompts: list[Any]) -> Iterator[tuple[str, Callable[[], str]]]:
    """Requests of a model that generates."""
    from oxjax import BeamParams, Grammar, SamplingParams  # noqa: PLC0415

    ids = [p if isinstance(p, list) else llm.tokenizer.encode(p) for p in prompts]
    greedy = SamplingParams(max_tokens=24, temperature=0.0, logprobs=2, seed=0)
    every_stage = SamplingParams(max_tokens=24, seed=11, logprobs=3, **STAGES)
    drawn = SamplingParams(max_tokens=12, temperature=0.9, top_p=0.9, seed=5)

    def generate(params: SamplingParams, given: Any = None) -> str:
        return of_results(llm.generate(ids if given is None else given, params))

    yield "greedy", lambda: generate(greedy)
    yield "every stage", lambda: generate(every_stage)
    yield "plain draw", lambda: generate(SamplingParams(max_tokens=40, temperature=1.0, seed=3))
    grammar = Grammar.regex("([a-z]{2,6} ){3,8}")
    free = {"min_tokens": 0, "top_n_sigma": 0.0, "banned_tokens": (), "mirostat_tau": 6.0}
    yield "guided", lambda: generate(dataclasses.replace(every_stage, grammar=grammar, **free))
    yield "n > 1", lambda: generate(dataclasses.replace(drawn, n=3))
    yield "best_of", lambda: generate(dataclasses.replace(drawn, n=2, best_of=4))
    yield "prompt_logprobs", lambda: generate(dataclasses.replace(drawn, prompt_logprobs=2))
    searched = SamplingParams(temperature=0.0, max_tokens=10)
    beams = BeamParams(width=4, length_penalty=0.6)
    yield "beams", lambda: digest(*(of_results(found) for found in llm.beam_search(ids[:2], beams, searched)))
    yield "logits", lambda: digest(*llm.logits(ids))
    pairs = [(ids[0], t) for t in (ids[1][:5], ids[2][:1], ids[1][3:4])] + [(ids[1], ids[0][:9])]
    yield "scores", lambda: digest(*([x.hex() for x in s.token_logprobs] + s.ranks for s in llm.score(pairs)))
    yield "embeddings", lambda: digest(np.asarray(llm.embed(ids, pooling="mean")), np.asarray(llm.embed(ids, "last")))
    long = (ids[2] * 8)[:150]
    yield "prefix hit", lambda: generate(drawn, [long]) + generate(drawn, [[*long, *ids[1][:4]], long])
    yield "preempted", lambda: preempted(llm.model, ids, dataclasses.replace(drawn, max_tokens=40, ignore_eos=True))


def preempted(model: Any, ids: list[list[int]], params: Any) -> str:
    """The bits of requests on an engine with too few pages for all of them."""
    from oxjax.engine.config import EngineConfig  # noqa: PLC0415
    from oxjax.engine.engine import Engine  # noqa: PLC0415

    n_pages = 1 + -(-(len(ids[2]) + 41) // 16) + 2
    engine = Engine(model, EngineConfig(n_pages, max_batch=3, max_rows=32, max_context=128))
    requests = [engine.generate(prompt, params, i) for i, prompt in enumerate(ids)]
    engine.run(requests)
    assert engine.metrics().preemptions or not engine.pool.pages, "nothing was preempted"
    return digest(*([c.token_id, c.logprob.hex()] for r in requests for c in r.output.chunks))


def encoding(llm: Any) -> Iterator[tuple[str, Callable[[], str]]]:
    """Requests of an encoder."""
    for pooling in ("mean", "cls", "none"):
        yield f"embeddings {pooling}", lambda p=pooling: digest(*map(np.asarray, llm.embed(IDS, p)))


def write_synthetic(case: str, folder: Path) -> Path:
    from tests.helpers.recurrent_synth import CASES, write  # noqa: PLC0415

    path = folder / f"{case}.gguf"
    write(path, case.partition(":")[0], *CASES[case], DATA / "archs" / "llama.gguf")
    return path


def open_model(path: Path | None, exact: bool, backend: str, activations: str, sizes: dict[str, int]) -> Any:
    from oxjax import LLM  # noqa: PLC0415

    weights = "float32" if backend == "xla" else "auto"
    return LLM(path, exact=exact, weights=weights, activations=activations, backend=backend, max_context=256, **sizes)


def places() -> Iterator[tuple[str, bool, str, str]]:
    """Model, exactness, backend and activations of everything that is measured."""
    for name in (*TRAINED, *FILES, *SYNTHETIC, *ENCODERS):
        more = BESIDES if name in TRAINED else BESIDES[:1] if name == "Q4_K_M" else []
        for mode in EVERYWHERE + more:
            yield name, *mode


def measure(name: str, exact: bool, backend: str, activations: str, sizes: dict[str, int]) -> dict[str, str]:
    """The hashes of one model in one mode, by kind of request; `sizes` are further options of `LLM`."""
    with tempfile.TemporaryDirectory() as folder:
        if name in SYNTHETIC:
            path = write_synthetic(name, Path(folder))
        else:
            file = (TRAINED | FILES | ENCODERS)[name]
            path = None if file is None else DATA / file
        llm = open_model(path, exact, backend, activations, sizes)
        prompts = PROMPTS if name in TRAINED else IDS
        requests = encoding(llm) if name in ENCODERS else generating(llm, prompts)
        return {kind: run() for kind, run in requests}


def measured_apart(only: str) -> dict[str, str]:
    """The hashes of this checkout.

    Every model and mode has a process of its own: one holds no more compiled programs than the system maps.
    """
    found: dict[str, str] = {}
    for name, exact, backend, activations in places():
        place = f"{name}/{'exact' if exact else 'fast'},{backend},{activations}"
        if only not in place:
            continue
        hashes = measured([name, exact, backend, activations, {}])
        found |= {f"{place}/{kind}": value for kind, value in hashes.items()}
        print(f"{place}: {len(found)} hashes", file=sys.stderr, flush=True)
    return found


def measured(place: list[Any]) -> dict[str, str]:
    """The hashes of a place, in a process of its own."""
    command = [sys.executable, __file__, "--place", json.dumps(place)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def compare_shapes(only: str) -> int:
    """Hash models in engines of other sizes; returns the number of hashes that differ from those of the usual sizes."""
    n_differing = 0
    for name in (n for n in SHAPED if only in n):
        place = [name, True, "native", "int8"]
        usual = measured([*place, {}])
        for sizes in SHAPES:
            found = measured([*place, sizes])
            differing = [kind for kind in usual if found[kind] != usual[kind]]
            n_differing += len(differing)
            print(
                f"{'DIFFERS' if differing else 'equal  '} {name}, {sizes}: {', '.join(differing or usual)}", flush=True
            )
    return n_differing


def of_revision(revision: str, only: str) -> dict[str, str]:
    """The hashes of another revision of this repository by its own copy of this file, or those of a file."""
    if Path(revision).is_file():
        return {k: v for k, v in json.loads(Path(revision).read_text()).items() if only in k}
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder) / "tree", Path(folder) / "bits.json"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", root, revision], cwd=ROOT, check=True)
        try:
            command = [sys.executable, root / "tools" / "bits.py", "--only", only, "--json", out]
            env = {**os.environ, "OXJAX_TEST_DATA": str(DATA), "PYTHONPATH": str(root)}
            subprocess.run(command, cwd=root, env=env, stdout=subprocess.DEVNULL, check=True)
            return json.loads(out.read_text())
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", root], cwd=ROOT, check=True)


def compare(found: dict[str, str], others: dict[str, str]) -> int:
    """Print what was compared; returns the exit status."""
    missing = sorted(found.keys() ^ others.keys())
    changed = sorted(k for k in found.keys() & others.keys() if found[k] != others[k])
    for place in sorted({k.rpartition("/")[0] for k in found}):
        kinds = [k.rpartition("/")[2] for k in found if k.startswith(place + "/")]
        differing = [k for k in changed + missing if k.startswith(place + "/")]
        print(f"{'DIFFERS' if differing else 'equal  '} {place}: {', '.join(kinds)}")
    for name in changed:
        print(f"changed: {name}")
    for name in missing:
        print(f"only {'here' if name in found else 'there'}: {name}")
    print(f"{len(found)} hashes here, {len(others)} there, {len(changed)} changed, {len(missing)} without a match")
    if missing or any(",native," in k and "/exact," in k for k in changed):
        return 1
    return 2 if changed else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REV|FILE")
    parser.add_argument("--only", default="", metavar="TEXT", help="models and modes whose name contains this")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--shapes", action="store_true", help="compare sizes of the engine instead")
    parser.add_argument("--place", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.place:
        json.dump(measure(*args.place), sys.stdout)
        return
    if args.shapes:
        raise SystemExit(compare_shapes(args.only) > 0)
    found = measured_apart(args.only)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    if args.against:
        raise SystemExit(compare(found, of_revision(args.against, args.only)))
    for name, value in found.items():
        print(value[:16], name)


if __name__ == "__main__":
    main()
