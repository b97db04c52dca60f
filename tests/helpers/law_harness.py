"""One place that runs requests alone and under all circumstances, and compares every bit of what they give."""

import dataclasses
import tempfile
from functools import cached_property
from pathlib import Path

import numpy as np

import oxjax
from oxjax import SamplingParams
from oxjax.assets import embedded_model
from oxjax.engine.config import EngineConfig
from oxjax.engine.engine import Engine
from oxjax.engine.request import Capture
from oxjax.machine import enable_compilation_cache
from oxjax.tokenizer import Tokenizer
from tests.helpers import encoder_synth, recurrent_synth, synth
from tests.helpers.toy import LAYERS, toy_model

EMBEDDED = "embedded"
RANDOM = "random "  # before a name: a file of random weights, which one of the synthesisers writes
STORIES = "models/stories260K/stories260K"
_R = synth.RECIPES
# One or two layers of what the law has to be held for; cases of `recurrent_synth` have the recurrences.
SMALL = {
    "latents": _R["minicpm3"].but(layers=1),
    "windows": _R["gemma3"],
    "soft caps": _R["gemma2"].but({"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
    "experts": _R["llama"].but(experts=synth.Experts()),
    "encoder": encoder_synth.ENCODERS["bert"][0].but({"context_length": 512}),
}
TOYS = tuple(f"toy {kind}" for kind in LAYERS)
# Prompts are random tokens, after which a model may end the text at once.
PARAMS = SamplingParams(
    max_tokens=12,
    min_tokens=12,
    temperature=0.9,
    temperature_range=0.2,
    top_k=50,
    typical_p=0.98,
    top_p=0.95,
    min_p=0.01,
    top_a=0.01,
    epsilon_cutoff=0.001,
    eta_cutoff=0.001,
    top_n_sigma=4.0,
    xtc_probability=0.3,
    mirostat=2,
    mirostat_tau=1.5,
    logit_bias={60: 2.0, 300: -1.5, 301: 3.25},
    banned_tokens=(70, 310),
    stop_token_ids=(301,),
    repetition_penalty=1.3,
    frequency_penalty=0.1,
    presence_penalty=0.2,
    penalty_window=20,
    seed=11,
    logprobs=3,
    ignore_eos=True,
)


def prompts(n, length, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 500, length + 7 * i).tolist() for i in range(n)]


def load(name, data, *, exact=True, weights="auto", backend="auto"):
    """A model by name: the embedded one, a toy, a random file, or a file of the data folder."""
    enable_compilation_cache()
    options = {"exact": exact, "weights": weights, "backend": backend}
    if name == EMBEDDED:
        return oxjax.load(embedded_model(), **options)
    if name in TOYS:
        return toy_model(name.removeprefix("toy "), Tokenizer.from_gguf(embedded_model()), exact=exact, backend=backend)
    if name.startswith(RANDOM):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_random(path, name.removeprefix(RANDOM), data / "archs")
            return oxjax.load(path, **options)
    return oxjax.load(data / f"{name}.gguf", **options)


def write_random(path, case, archs):
    if case in SMALL:
        recipe = SMALL[case]
        synth.write(path, recipe, archs / ("bert.gguf" if recipe.arch == "bert" else "llama.gguf"))
    else:
        recurrent_synth.write(path, case.split(":")[0], *recurrent_synth.CASES[case], archs / "llama.gguf")


def outcome(request):
    """All that a request gave: logits of every position, or tokens, log-probabilities and the likeliest others."""
    if isinstance(request, Capture):
        return np.concatenate(request.rows).tobytes()
    return [(c.token_id, c.logprob, c.top_logprobs) for c in request.output.chunks]


class Harness:
    """One model under engines of different shapes."""

    def __init__(self, model):
        self.model = model

    def engine(self, *, max_rows=64, max_batch=4, max_context=192, page_size=16, n_pages=None, **options):
        config = EngineConfig(
            n_pages=1 + (max_batch * -(-max_context // page_size) if n_pages is None else n_pages),
            page_size=page_size,
            max_batch=max_batch,
            max_rows=max_rows,
            max_context=max_context,
            **{
                "reuse_prefixes": False,
                "checkpoint_every": page_size,
                "n_checkpoints": 40,
                "steps_per_call": 3,
                **options,
            },
        )
        return Engine(self.model, config)

    @cached_property
    def _single(self):
        return self.engine(max_rows=256, max_batch=1, steps_per_call=1)

    def alone(self, ids, params=PARAMS, seed=None):
        """What a prompt scores, and what it generates, each by itself on an engine that reuses nothing."""
        given = []
        for request in (
            lambda: self._single.logits(ids),
            lambda: self._single.generate(ids, params, params.seed if seed is None else seed),
        ):
            given.append(request())
            self._single.run(given)
        return [outcome(r) for r in given]

    def generated_alone(self, ids, params=PARAMS, seed=None):
        request = self._single.generate(ids, params, params.seed if seed is None else seed)
        self._single.run([request])
        return outcome(request)

    def run(self, ids, *, neighbours=(), **shape):
        """The same in company, on an engine of some shape."""
        return self.run_in(self.engine(**shape), ids, neighbours)

    def run_in(self, engine, ids, neighbours=()):
        """The same on an engine that may have run before, or have others running."""
        others = [engine.generate(p, dataclasses.replace(PARAMS, seed=i), i) for i, p in enumerate(neighbours)]
        both = [engine.logits(ids), engine.generate(ids, PARAMS, PARAMS.seed)]
        engine.run(both + others)
        if not engine.scheduler.running:
            assert not any(pool.used_count for pool in (engine.pool.pages, engine.pool.slots))
        return [outcome(r) for r in both]
