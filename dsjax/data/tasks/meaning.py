"""What a task means: its results on the battery of its type. Same meaning, same fingerprint, however it is made."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Sequence
from typing import Any

from dsjax.data.tasks.families import Family
from dsjax.data.tasks.operation import Step, TooLarge, outcomes, pick
from dsjax.data.tasks.values import Arguments, battery

MIN_RESULTS = 6  # different ones on the battery: a function that hardly looks at its input can be guessed
MOST_MUTANTS = 24


# A text that is the same for equal values; dictionaries are equal in any order.
canonical = functools.partial(json.dumps, sort_keys=True)


def values(steps: Sequence[Step], inputs: Sequence[Arguments]) -> list[Any]:
    """What steps make of each input. As values hold integers, texts, lists and dictionaries only, ``==`` compares them.

    Raises:
        TooLarge: a value on the way is.
    """
    return list(outcomes(steps, inputs))


def fingerprint(kind: str, outcome: Sequence[Any]) -> str:
    """A SHA-256 of the results on the battery of a type, in hexadecimal."""
    return hashlib.sha256("\n".join((kind, *map(canonical, outcome))).encode()).hexdigest()


def sound(steps: Sequence[Step]) -> list[Any] | None:
    """The results on the battery, if steps make a task: nothing grows too large, the result depends on the input, and
    every step that could be left out changes it. Else None.
    """
    inputs = battery(steps[0].operation.takes)
    try:
        outcome = values(steps, inputs)
        if len(set(map(canonical, outcome))) < MIN_RESULTS:
            return None
        for at, step in enumerate(steps):
            without = (*steps[:at], *steps[at + 1 :])
            if without and step.operation.takes == step.operation.gives and values(without, inputs) == outcome:
                return None
    except TooLarge:
        return None
    return outcome


def mutants(steps: Sequence[Step], family: Family, draw: random.Random) -> list[tuple[Step, ...]]:
    """What wrong solutions would compute: a step is left out, two are swapped, one is replaced by another of the same
    types or has other parameters. Some may mean the same as the task itself.
    """
    steps = tuple(steps)
    found: list[tuple[Step, ...]] = []
    for at, step in enumerate(steps):
        takes, gives = step.operation.takes, step.operation.gives
        if takes == gives and len(steps) > 1:
            found.append((*steps[:at], *steps[at + 1 :]))
        if at + 1 < len(steps) and takes == gives == steps[at + 1].operation.takes == steps[at + 1].operation.gives:
            found.append((*steps[:at], steps[at + 1], step, *steps[at + 2 :]))
    while len(found) < MOST_MUTANTS:
        at = int(draw.random() * len(steps))
        other = pick(draw, [*family.alternatives(steps[at]), steps[at].operation]).step(draw)
        found.append((*steps[:at], other, *steps[at + 1 :]))
    return found
