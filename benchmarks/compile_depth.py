"""Time to trace and compile the first step, by depth: the layers of a model are repeated 4 and 32 times.

python benchmarks/compile_depth.py [MODEL.gguf ...] [--depths 4,32] [--fast]
"""

import argparse
import dataclasses
import time
from functools import partial

import jax
import jax.numpy as jnp

import oxjax
from oxjax.assets import embedded_model


def seconds(model: oxjax.Model, depth: int) -> float:
    """Time to the first compiled step of 16 rows."""
    jax.clear_caches()
    period = len(model.config.layers)
    places = [i % period for i in range(depth)]
    config = dataclasses.replace(model.config, layers=tuple(model.config.layers[i] for i in places))
    params = model.params.replace(layers=tuple(model.params.layers[i] for i in places))
    state = oxjax.init_state(config, n_pages=9, page_size=16, n_slots=3)
    shapes = {"tokens": 16, "positions": 16, "cu_q_lens": 3, "kv_lens": 2, "logits_rows": 2, "block_tables": (2, 8)}
    shapes |= {"read_slots": 2, "write_slots": 2}
    batch = oxjax.Batch(**{name: jnp.zeros(shape, jnp.int32) for name, shape in shapes.items()})
    step = jax.jit(partial(oxjax.step, config=config), donate_argnums=1)
    begin = time.perf_counter()
    step.lower(params, state, batch).compile()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=[str(embedded_model())])
    parser.add_argument("--depths", default="4,32")
    parser.add_argument("--fast", action="store_true")
    args = parser.parse_args()
    few, many = map(int, args.depths.split(","))
    for path in args.models:
        model = oxjax.load(path, exact=not args.fast)
        shallow, deep = seconds(model, few), seconds(model, many)
        name = model.config.architecture
        print(f"{name}: {few} layers {shallow:.1f} s, {many} layers {deep:.1f} s, ratio {deep / shallow:.1f}")


if __name__ == "__main__":
    main()
