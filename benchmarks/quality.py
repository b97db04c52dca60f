"""What quantised products cost in quality: perplexity with weights kept as integers, and activations rounded to eight
bits, against dequantised math of the same file.

python -m benchmarks.quality [--model FILE ...] [--formats Q8_0,Q4_0,Q4_K_M,Q5_K_M,Q6_K] [--stories 20]

Without a model: the embedded one. Every file is quantised by llama.cpp's quantiser, which gives tensors whose rows a
format does not fit a similar format that they do fit. The text is stories that the embedded model never saw, cut to
half of a model's context.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.random_model import quantize
from oxjax import LLM
from oxjax.assets import embedded_model
from oxjax.gguf import GGUFFile
from tools.demo.corpus import story

FORMATS = ("Q8_0", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K")
BATCH = 8


def perplexity(llm: LLM, texts: list[list[int]]) -> float:
    """Of ids after the first of each text, summed in float64."""
    total, n = 0.0, 0
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        for ids, logits in zip(batch, llm.logits(batch), strict=True):
            rows = logits[:-1].astype(np.float64)
            largest = rows.max(axis=1)
            normaliser = largest + np.log(np.exp(rows - largest[:, None]).sum(axis=1))
            total += float((rows[np.arange(len(rows)), ids[1:]] - normaliser).sum())
            n += len(rows)
    return float(np.exp(-total / n))


def held_out(llm: LLM, n_stories: int) -> list[list[int]]:
    """Ids of stories with numbers that training does not reach."""
    return [llm.tokenizer.encode(story(10**7 + i))[: llm.max_context // 2] for i in range(n_stories)]


def compare(path: Path, n_stories: int) -> tuple[float, float]:
    """Perplexity of a file with dequantised math, and with quantised products."""
    found = []
    for weights in ("float32", "file"):
        with LLM(path, weights=weights, max_batch=BATCH) as llm:
            found.append(perplexity(llm, held_out(llm, n_stories)))
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", type=Path, help="may be repeated; default: the embedded one")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--stories", type=int, default=20)
    options = parser.parse_args()
    print("| model | format | dequantised | quantised | ratio | matrices |\n| --- | --- | --- | --- | --- | --- |")
    for model in options.model or [embedded_model()]:
        for kind in options.formats.split(","):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "quantised.gguf"
                quantize(model, path, kind)
                with GGUFFile.open(path) as file:
                    kinds = Counter(t.ggml_type.name for t in file.tensors.values() if len(t.shape) > 1)
                plain, kept = compare(path, options.stories)
            mix = ", ".join(f"{n} {name}" for name, n in kinds.most_common())
            print(
                f"| {Path(model).name} | {kind} | {plain:.4f} | {kept:.4f} | {kept / plain:.5f} | {mix} |", flush=True
            )


if __name__ == "__main__":
    main()
