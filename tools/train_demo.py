"""Make the embedded models from nothing: stories, tokenizer, training, GGUF files and model card.

python tools/train_demo.py                                    # the real thing, about 25 minutes on two free cores
python tools/train_demo.py --steps 4 --stories 300 --out /tmp/demo   # does it run at all
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from demo import corpus, export, model, train
from demo.card import card
from demo.ngram import NGram

ASSETS = Path(__file__).parents[1] / "oxjax" / "assets"
HELD_OUT = 1000
SEED = 0


def log(line: str) -> None:
    print(line, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3200, help="optimiser steps for each model")
    parser.add_argument("--stories", type=int, default=40_000, help="training stories")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder for the files and the card")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    texts, hidden = corpus.split(args.stories, min(HELD_OUT, args.stories // 10), SEED)
    tokenizer = train.train_tokenizer(texts, model.MAIN.vocab)
    stories, held_out = train.encode(tokenizer, texts), train.encode(tokenizer, hidden)
    ids, vocab = train.stream(stories), tokenizer.get_vocab_size()
    tune = len(held_out)
    unigram, trigram = NGram(stories[:-tune], stories[-tune:], vocab).losses(held_out)
    log(f"{len(texts)} stories, {len(ids)} tokens, {vocab} kinds; unigram {unigram:.4f}, trigram {trigram:.4f}")

    numbers: dict[str, object] = {}
    for role, base, file, name, about in (
        ("main", model.MAIN, "demo.gguf", "oxjax demo", "Tells short children's stories."),
        ("draft", model.DRAFT, "demo-draft.gguf", "oxjax demo draft", "Drafts for the oxjax demo model."),
    ):
        shape = replace(base, vocab=vocab)
        params, seconds = train.fit(shape, ids, args.steps, SEED, log)
        params = export.write(args.out / file, params, shape, tokenizer, name, about)
        loss = train.held_out_loss(params, shape, held_out)
        size = sum(leaf.size for leaf in params.values())
        log(f"{file}: {size} parameters, held-out loss {loss:.4f}, {seconds / 60:.1f} minutes")
        numbers |= {f"{role}_file": file, f"{role}_params": size, f"{role}_minutes": seconds / 60}
        numbers |= {f"{role}_loss": loss, f"{role}_ppl": math.exp(loss)}
        if role == "main":
            prompt = train.encode(tokenizer, ["Once upon a time"])[0][:-1].tolist()
            told = train.sample(params, shape, prompt, tokenizer.token_to_id(train.END), 0.4, SEED)
            numbers["sample"] = tokenizer.decode(told)
    text = card(
        **numbers,
        unigram=unigram,
        unigram_ppl=math.exp(unigram),
        trigram=trigram,
        trigram_ppl=math.exp(trigram),
        context=model.MAIN.context,
        vocab=vocab,
        stories=len(texts),
        tokens=len(ids),
        held_out=len(held_out),
        held_out_tokens=sum(len(ids) - 1 for ids in held_out),
        steps=args.steps,
        seed=SEED,
        cores=os.cpu_count(),
        command="python tools/train_demo.py" + "".join(f" {a}" for a in sys.argv[1:]),
    )
    (args.out / "README.md").write_text(text, "utf-8")
    log(text)


if __name__ == "__main__":
    main()
