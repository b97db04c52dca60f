"""Engines that can be compared: a module each, with a class `Engine` that a worker holds.

Its methods `prefill`, `decode` and `score` take prompts, the number of tokens to decode and the engine's settings, and
return seconds and the tokens that they are for; `first_token` is a prompt without any preparation. Choosing the most
likely token on the host is part of the time of all of them.
"""


def spare_tokens(n_seqs: int) -> int:
    """Tokens that a sequence may go on for beside those that are timed, while others begin or end.

    oxjax may take 64 steps at once, before and after.
    """
    return 128 + n_seqs
