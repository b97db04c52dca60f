"""The model card of the embedded models, written by the recipe with the numbers that it measured."""

from __future__ import annotations

CARD = """\
# The embedded models

Two tiny models, so that `oxjax` works without a download. `{main_file}` ({main_params:,} parameters) tells short
children's stories; `LLM()` loads it. `{draft_file}` ({draft_params:,} parameters) has the same tokenizer and training
data, and is meant as a draft model for speculative decoding, which oxjax does not have yet. Both show that an engine
works; they know nothing about the world.

- Architecture: `llama` (RMS norm, grouped-query attention, interleaved RoPE, SwiGLU, tied output), context {context}.
- Weights: Q8_0 matrices, F32 norms. Licence: Apache-2.0, like the project.
- Tokenizer: byte-level BPE, {vocab} tokens, GPT-2 splitting; `<|endoftext|>` stands before and after every story, so
  a prompt begins with it and a story ends with it.
- Data: {stories:,} stories ({tokens:,} tokens) from a grammar written for this project (`tools/demo/plots.txt`,
  `tools/demo/tables.txt`). No text and no weights come from anywhere else.
- Limits: English words of the grammar only; a prompt in other words is continued as if it were one of these stories.
  Names can drift within a story, more so at higher temperatures: 0.4 reads best.

## Numbers

Printed by `{command}` (seed {seed}, {steps} steps of 2,048 tokens for each model; training
took {main_minutes:.1f} and {draft_minutes:.1f} minutes on {cores} CPU cores). Loss is nats per token on {held_out:,}
held-out stories ({held_out_tokens:,} tokens), none of which is a training story, with the weights as they are in the
files.

| model | held-out loss | perplexity |
|---|---|---|
| unigram counts | {unigram:.4f} | {unigram_ppl:.1f} |
| interpolated trigram counts | {trigram:.4f} | {trigram_ppl:.2f} |
| `{draft_file}` | {draft_loss:.4f} | {draft_ppl:.2f} |
| `{main_file}` | {main_loss:.4f} | {main_ppl:.2f} |

## A story

"Once upon a time" continued at temperature 0.4, seed {seed}:

{sample}
"""


def card(**numbers: object) -> str:
    """The text of the card; every placeholder of `CARD` must be given."""
    quoted = "\n".join(f"> {line}".rstrip() for line in str(numbers.pop("sample")).splitlines())
    return CARD.format(sample=quoted, **numbers)
