"""Prefill and decode speed of oxjax beside llama.cpp's, on one file, in one run.

python benchmarks/versus_llama_cpp.py MODEL.gguf [--prompt 512] [--new 64] [--batch 1 8] [--fast] [--rounds 5]
    [--weights quantized]

Rounds alternate between the two, so that a machine that slows down slows both; the medians of the rounds and
the ratio of the medians are printed. llama.cpp runs with as many threads as this process may use.
"""

import argparse
import os
import statistics
import time

import jax
import llama_cpp
import numpy as np

from oxjax import LLM, SamplingParams


class Oxjax:
    def __init__(self, path: str, options: argparse.Namespace):
        context = options.prompt + options.new
        self.llm = LLM(
            path,
            exact=not options.fast,
            weights=options.weights,
            max_batch=max(options.batch),
            max_context=context,
        )
        self.llm.warm_up()

    def measure(self, prompts: list[list[int]], n_new: int) -> tuple[float, float]:
        """Seconds for the prompts, and for the tokens after them."""
        engine = self.llm.engine
        params = SamplingParams(max_tokens=n_new, temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        requests = [engine.generate(p, params, 0) for p in prompts]
        while any(not r.output.chunks for r in requests):
            engine.step()
        middle = time.perf_counter()
        while not all(r.done for r in requests):
            engine.step()
        return middle - start, time.perf_counter() - middle


class LlamaCpp:
    def __init__(self, path: str, options: argparse.Namespace):
        llama_cpp.llama_log_set(self._quiet, None)
        model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        n_seqs = max(options.batch)
        params.n_ctx = (options.prompt + options.new) * n_seqs
        params.n_batch = params.n_ctx
        params.n_seq_max = n_seqs
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        self.context = llama_cpp.llama_init_from_model(model, params)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    @staticmethod
    @llama_cpp.llama_log_callback
    def _quiet(*_: object) -> None:
        pass

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        assert llama_cpp.llama_decode(self.context, batch) == 0
        llama_cpp.llama_batch_free(batch)

    def _greedy(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())

    def measure(self, prompts: list[list[int]], n_new: int) -> tuple[float, float]:
        """Seconds for the prompts, and for the tokens after them."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        start = time.perf_counter()
        last = []
        for s, prompt in enumerate(prompts):
            self._decode([(t, i, s, i == len(prompt) - 1) for i, t in enumerate(prompt)])
            last.append(self._greedy(len(prompt) - 1))
        middle = time.perf_counter()
        for i in range(n_new - 1):
            self._decode([(t, len(prompts[0]) + i, s, True) for s, t in enumerate(last)])
            last = [self._greedy(row) for row in range(len(prompts))]
        return middle - start, time.perf_counter() - middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fast", action="store_true", help="measure oxjax in fast mode instead of exact")
    parser.add_argument("--weights", default="auto", help="of oxjax: auto, quantized or float32")
    options = parser.parse_args()
    engines = {"oxjax": Oxjax(options.model, options), "llama.cpp": LlamaCpp(options.model, options)}
    vocab = engines["llama.cpp"].vocab
    rng = np.random.default_rng(0)
    mode, cores = "fast" if options.fast else "exact", len(os.sched_getaffinity(0))
    print(f"{options.model}, {mode}, {options.weights} weights, {cores} cores, jax {jax.__version__}")
    for n in options.batch:
        seconds = {name: [] for name in engines}
        for turn in range(options.rounds + 1):
            prompts = rng.integers(3, vocab, (n, options.prompt)).tolist()  # new ones, or prefixes would be found
            for name, engine in engines.items():
                measured = engine.measure(prompts, options.new)
                if turn:  # the first round warms caches
                    seconds[name].append(measured)
        for phase, i, tokens in (("prefill", 0, n * options.prompt), ("decode", 1, n * (options.new - 1))):
            rate = {name: tokens / statistics.median(s[i] for s in both) for name, both in seconds.items()}
            shown = ", ".join(f"{name} {r:.1f}" for name, r in rate.items())
            print(f"{n} sequences, {phase}: {shown} tokens/s, ratio {rate['oxjax'] / rate['llama.cpp']:.2f}")


if __name__ == "__main__":
    main()
