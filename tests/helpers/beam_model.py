"""A tiny random Llama whose texts end often, and beam search on it as its definition reads, step by step."""

import string
from collections import Counter

import gguf
import numpy as np

from tests.helpers.synth import RECIPES, write
from tests.helpers.synthetic_vocab import CONTROL, NORMAL, UNKNOWN, metadata, write_gguf

PAIRS = ["th", "he", "▁a", "in", "er", "an", "▁t", "on"]
TOKENS = ["<unk>", "<s>", "</s>", "\n", "▁", *string.ascii_lowercase, *string.digits, *'{}[]":,.-', *PAIRS]
BEGIN, END = 1, 2


def write_model(path, *, nan_after=()):
    """The GGUF file; logits that follow these tokens are not finite."""
    types = [UNKNOWN, CONTROL, CONTROL, *[NORMAL] * (len(TOKENS) - 3)]
    scores = np.zeros(len(TOKENS), np.float32)
    keys = metadata("llama", TOKENS, types=types, scores=scores, bos_token_id=BEGIN, eos_token_id=END)
    vocabulary = write_gguf(path.with_suffix(".vocabulary"), keys)
    write(path, RECIPES["llama"].but(untied=True), vocabulary)
    tensors = {t.name: t.data for t in gguf.GGUFReader(path, "r+").tensors}
    tensors["output.weight"][:] *= 1.5
    tensors["output.weight"][END] *= 3.0  # likely after some texts, unlikely after others
    tensors["token_embd.weight"][list(nan_after)] = np.nan
    tensors["output.weight"].flush()
    return path


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def same(tokens, logits):
    return logits


def naive_search(llm, prompt, n_new, *, width, penalty, early, n_groups=1, diversity=0.0, change=same):
    """Texts of up to `n_new` tokens with their scores, best first: every step sorts all continuations of all beams.

    The `2 * width` best continuations are candidates. Of those among the first `width`, the ones that end are texts;
    the best `width` of the others go on. A group that is over chooses nothing (Vijayakumar et al. 2016, algorithm 1).
    """
    size = width // n_groups
    live = {g: [(0.0, [])] for g in range(n_groups)}
    found = {g: [] for g in range(n_groups)}
    for length in range(1, n_new + 1):
        said = Counter()
        for g in list(live):
            rows = [(total, tokens, prompt + tokens) for total, tokens in live[g]]
            logits = [rows[-1] for rows in llm.logits([ids for *_, ids in rows])]
            table = [
                (total + logprob - diversity * said[token], total + logprob, [*tokens, token])
                for (total, tokens, ids), row in zip(rows, logits, strict=True)
                for token, logprob in enumerate(log_softmax(change(ids, row)))
            ]
            table.sort(key=lambda entry: -entry[0])
            candidates = [(t[-1] == END or length == n_new, total, t) for _, total, t in table[: 2 * size]]
            ended = [(total / length**penalty, t) for ends, total, t in candidates[:size] if ends and total > -np.inf]
            found[g] = sorted(found[g] + ended, key=lambda text: -text[0])[:size]
            live[g] = [(total, t) for ends, total, t in candidates if not ends and total > -np.inf][:size]
            reach = n_new if penalty > 0 else length + 1
            is_full = len(found[g]) == size
            if not live[g] or (is_full and (early or live[g][0][0] / reach**penalty <= found[g][-1][0])):
                del live[g]
            else:
                said.update(t[-1] for _, t in live[g])
    return sorted((text for texts in found.values() for text in texts), key=lambda text: -text[0])
