"""What the host does when sequences decode, apart from the device: scheduling, a call's arrays, tokens and text.

python benchmarks/host_overhead.py [--running 1,16,64] [--steps 1,64] [--calls 200]

The engine is the real one, with real requests; the device's part is replaced by constants of the right shapes, so that
what is left is the host. The transfer of a call's rows to the device counts as the host's. Times are the median of the
processor time of a call; those of the parts are means.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import oxjax
from oxjax import SamplingParams
from oxjax.assets import embedded_model
from oxjax.engine import programs
from oxjax.engine.config import MAX_STEPS, EngineConfig
from oxjax.engine.decode import Decoded
from oxjax.engine.engine import Engine
from oxjax.models.load import Model
from oxjax.sampling.pipeline import Sampled

CONTEXT, PROMPT = 4096, 24
PARAMS = SamplingParams(temperature=0.8, top_p=0.95, ignore_eos=True, stop="never said")


def measure(model: Model, n: int, n_steps: int, n_calls: int) -> tuple[float, Counter[str]]:
    """Microseconds of the host for a call, and of its parts."""
    config = EngineConfig(
        n_pages=1 + n * CONTEXT // 16,
        page_size=16,
        max_batch=n,
        max_rows=max(256, n),
        max_context=CONTEXT,
        steps_per_call=n_steps,
    )
    engine = Engine(model, config)
    rng = np.random.default_rng(0)
    for i in range(n):
        engine.generate(rng.integers(300, model.config.vocab_size, PROMPT).tolist(), PARAMS, i)
    while len(engine.scheduler.running) < n or any(s.n_pending > 1 for s in engine.scheduler.running):
        engine.step()
    chosen = Sampled(
        tokens=jnp.full((MAX_STEPS, n), 300, jnp.int32),
        logprobs=jnp.zeros((MAX_STEPS, n)),
        ranks=jnp.ones((MAX_STEPS, n), jnp.int32),
        top_tokens=jnp.zeros((MAX_STEPS, n, 0), jnp.int32),
        top_logprobs=jnp.zeros((MAX_STEPS, n, 0)),
        mus=jnp.zeros((MAX_STEPS, n)),
        faults=jnp.zeros((MAX_STEPS, n), jnp.int32),
    )
    decoded = Decoded(n_steps=jnp.int32(n_steps), chosen=chosen)
    parts: Counter[str] = Counter()

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            begin = time.thread_time_ns()
            result = function(*given, **named)
            parts[part] += time.thread_time_ns() - begin
            return result

        return call

    def transferred(params: Any, state: Any, packed: np.ndarray, *_: Any, **__: Any) -> tuple[Decoded, Any]:
        jax.device_put(packed)
        return decoded, state

    device, programs.decode = programs.decode, timed("transfer", transferred)
    engine.runner._counted = lambda *_: nullcontext()
    engine.runner.decode = timed("arrays and transfer", engine.runner.decode)
    for name in ("schedule", "reserve_ahead", "commit"):
        setattr(engine.scheduler, name, timed("scheduling", getattr(engine.scheduler, name)))
    times = []
    for _ in range(n_calls):
        engine.loop.step_seconds = 1e-9
        begin = time.thread_time_ns()
        engine.step()
        times.append(time.thread_time_ns() - begin)
        assert len(engine.scheduler.running) == n
    programs.decode = device
    parts = Counter({part: total / n_calls / 1000 for part, total in parts.items()})
    parts["arrays"] = parts.pop("arrays and transfer") - parts["transfer"]
    whole = statistics.median(times) / 1000
    parts["tokens and text"] = statistics.fmean(times) / 1000 - parts.total()
    return whole, parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", default="1,16,64")
    parser.add_argument("--steps", default=f"1,{MAX_STEPS}", help="steps of a call")
    parser.add_argument("--calls", type=int, default=200)
    args = parser.parse_args()
    model = oxjax.load(embedded_model())
    for n in map(int, args.running.split(",")):
        for n_steps in map(int, args.steps.split(",")):
            n_calls = min(args.calls, (CONTEXT - PROMPT - 70) // n_steps)
            whole, parts = measure(model, n, n_steps, n_calls)
            shown = ", ".join(f"{part} {parts[part]:.0f}" for part in sorted(parts))
            print(
                f"{n:3} running, {n_steps:2} steps a call: {whole:6.0f} us a call, {whole / n_steps:5.0f} a step, "
                f"{whole / n_steps / n:5.1f} a token; of a call: {shown}"
            )


if __name__ == "__main__":
    main()
