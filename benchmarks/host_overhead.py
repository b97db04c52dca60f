"""What the host does per decode step, apart from the device: scheduling, batch arrays, sampling rows, text.

python benchmarks/host_overhead.py [--running 64] [--steps 400]

The engine is the real one, with real requests; the two jitted calls are replaced by constants of the right shapes,
so that what is left is the host. Device transfers of the batch arrays count as the host's.
"""

import argparse
import statistics
import time

import jax
import numpy as np

import oxjax
from oxjax import SamplingParams
from oxjax.assets import embedded_model
from oxjax.engine import runner
from oxjax.engine.engine import Engine
from oxjax.sampling.pipeline import Sampled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--running", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    n, vocab = args.running, 2048
    engine = Engine(
        oxjax.load(embedded_model()), n_pages=n * 40, page_size=16, max_batch=n, max_rows=max(256, n), max_context=512
    )
    logits = jax.device_put(np.zeros((n, vocab), np.float32))
    chosen = Sampled(
        tokens=np.full(n, 300, np.int32),
        logprobs=np.zeros(n, np.float32),
        top_tokens=np.zeros((n, 0), np.int32),
        top_logprobs=np.zeros((n, 0), np.float32),
        finite=np.ones(n, bool),
    )
    runner._step = lambda params, state, batch, config: (logits, state)
    runner._sample = lambda logits, rows, n_top, exact: chosen
    runner.CountCompilations.__enter__ = runner.CountCompilations.__exit__ = lambda self, *_: None
    params = SamplingParams(max_tokens=512 - 32, temperature=0.8, ignore_eos=True, stop="never said")
    rng = np.random.default_rng(0)
    for i in range(n):
        engine.generate(rng.integers(300, vocab, 24).tolist(), params, i)
    while len(engine.scheduler.running) < n or any(s.n_pending > 1 for s in engine.scheduler.running):
        engine.step()

    def median(steps: int) -> float:
        times = []
        for _ in range(steps):
            begin = time.thread_time()
            engine.step()
            times.append(time.thread_time() - begin)
        assert len(engine.scheduler.running) == n
        return statistics.median(times) * 1e6

    print(f"{n} running requests, processor time of a decode step, median of {args.steps // 2}:")
    whole = median(args.steps // 2)
    scheduling = 0.0

    def timed(function):
        def call(*given):
            nonlocal scheduling
            begin = time.thread_time()
            result = function(*given)
            scheduling += time.thread_time() - begin
            return result

        return call

    columns = {name: getattr(chosen, name) for name in chosen.__dataclass_fields__}
    engine.runner.run, engine.runner.sample = lambda work: (logits, None), lambda *_: columns
    engine.scheduler.schedule, engine.scheduler.commit = map(
        timed, (engine.scheduler.schedule, engine.scheduler.commit)
    )
    bookkeeping = median(args.steps // 2)
    print(f"  schedule and commit: {scheduling / (args.steps // 2) * 1e6:.0f} us (mean)")
    print(f"  with tokens handed out, stop texts looked for, and text made: {bookkeeping:.0f} us")
    print(f"  with batch arrays, sampling rows and transfers to the device: {whole:.0f} us")


if __name__ == "__main__":
    main()
