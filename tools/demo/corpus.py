"""Small children's stories from a grammar of our own: `plots.txt` says what happens, `tables.txt` with what.

A story draws a cast (from `cast.txt`) and one row of every table, then walks the beats of one plot. A slot
means the same thing from the first sentence to the last, so names, objects, causes and consequences agree.
"""

from __future__ import annotations

import random
import re
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
ELDERS = (("mom", "she"), ("dad", "he"), ("grandma", "she"), ("grandpa", "he"))
HE = {"he": "he", "him": "him", "his": "his", "himself": "himself"}
SHE = {"he": "she", "him": "her", "his": "her", "himself": "herself"}
CAST = {line.split(":")[0]: line.split()[1:] for line in (HERE / "cast.txt").read_text("utf-8").splitlines()}
FRAME = ("opening", "the friend", "closing")
INTRODUCES_FRIEND = ("a quarrel", "a new friend")


@cache
def tables() -> list[tuple[list[str], list[list[str]]]]:
    """(columns, rows) of every table of `tables.txt`."""
    found: list[tuple[list[str], list[list[str]]]] = []
    for line in (HERE / "tables.txt").read_text("utf-8").splitlines():
        if line.startswith("%"):
            found.append((line[1:].split(), []))
        elif line and not line.startswith("#"):
            columns, rows = found[-1]
            rows.append([cell.strip() for cell in line.split(";")])
            assert len(rows[-1]) == len(columns), f"tables.txt: {line!r} does not fill {columns}"
    return found


@cache
def plots() -> dict[str, list[list[str]]]:
    """Plot name -> beats, a beat being its alternative texts, of `plots.txt`."""
    found: dict[str, list[list[str]]] = {}
    text = re.sub(r"^#.*\n", "", (HERE / "plots.txt").read_text("utf-8"), flags=re.M)
    for chunk in text.split("== ")[1:]:
        name, *beats = (part.strip() for part in chunk.strip().split("\n\n"))
        found[name] = [[line[2:] for line in beat.splitlines()] for beat in beats]
    return found


class Slots(dict):
    """Slot values; a capitalised key (`{He}`, `{FHis}`) gives the capitalised value."""

    def __missing__(self, key: str) -> str:
        """Look the lower-case slot up and capitalise it."""
        value = self[key.lower()] if key != key.lower() else None
        if value is None:
            raise KeyError(f"plots.txt uses {{{key}}}, which no table fills")
        return value[:1].upper() + value[1:]


def _person(rng: random.Random, taken: str = "") -> tuple[str, dict[str, str], str]:
    """(name, pronouns, "girl" or "boy") of somebody not called `taken`; one name in three is invented."""
    girl = rng.random() < 0.5
    name = taken
    while name == taken:
        invented = "".join(rng.choices(CAST["syllables"], k=rng.choice((2, 2, 3)))).capitalize()
        name = invented if rng.random() < 1 / 3 else rng.choice(CAST["girls"] if girl else CAST["boys"])
    return name, SHE if girl else HE, "girl" if girl else "boy"


def _slots(rng: random.Random) -> Slots:
    slots = Slots()
    for columns, rows in tables():
        slots.update(zip(columns, rng.choice(rows), strict=True))
    hero, pronouns, kind = _person(rng)
    friend, friend_pronouns, friend_kind = _person(rng, hero)
    if rng.random() < 0.3:
        kind, friend_kind = rng.sample(CAST["animals"], 2)
    elder, elder_he = rng.choice(ELDERS)
    slots.update(pronouns, hero=hero, kind=kind, friend=friend, fkind=friend_kind, elder=elder)
    slots.update({"f" + k: v for k, v in friend_pronouns.items()})
    slots.update({"e" + k: v for k, v in (SHE if elder_he == "she" else HE).items()})
    return slots


def _tell(beats: list[list[str]], slots: Slots, rng: random.Random) -> list[str]:
    texts = (rng.choice(beat) for beat in beats)
    drawn = (re.sub(r"\[(.*?)\]", lambda m: rng.choice(m[1].split("|")), t) for t in texts if t != "-")
    return [t.format_map(slots) for t in drawn]


def story(seed: int) -> str:
    """One story of 80 to 220 words, a function of `seed` alone.

    Args:
        seed: any integer; different seeds give different stories with overwhelming probability.

    Returns:
        Plain text in two to four paragraphs.
    """
    rng = random.Random(seed)
    slots = _slots(rng)
    name = rng.choice([p for p in plots() if p not in FRAME])
    opening = list(plots()["opening"])
    if name not in INTRODUCES_FRIEND:
        opening += plots()["the friend"]
    first = " ".join(_tell(opening, slots, rng))
    beats = _tell(plots()[name] + plots()["closing"], slots, rng)
    cuts = sorted(rng.sample(range(2, len(beats) - 1), rng.choice((1, 2))))
    paragraphs = [beats[a:b] for a, b in zip([0, *cuts], [*cuts, len(beats)], strict=True)]
    text = "\n\n".join([first, *(" ".join(p) for p in paragraphs)])
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def split(n_train: int, n_held_out: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Training and held-out stories; no held-out story is also a training story.

    Args:
        n_train, n_held_out: stories drawn for each part; copies of held-out stories are dropped from training.
        seed: first story seed; the held-out stories are the first drawn, so they do not depend on `n_train`.
    """
    held_out = [story(seed + i) for i in range(n_held_out)]
    hidden = set(held_out)
    drawn = (story(seed + n_held_out + i) for i in range(n_train))
    return [text for text in drawn if text not in hidden], held_out
