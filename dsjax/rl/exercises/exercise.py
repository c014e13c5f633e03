"""An exercise, where exercises come from, and which of them may be learned from.

    exercise = family.exercise(level, number)                the same for ever, on every machine
    share    = SHA-256(question), as a number in [0, 1)
    split    = held out  below 1/8,   validation  below 3/16,   else training

The question decides on its side, so none is on two of them, whatever family, level or number it came by. The numbers
that are looked at differ, too: each split has a stretch of its own.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import random
from typing import Any, Literal

from dsjax.config import UserError
from dsjax.rl.exercises.form import AnswerForm

Split = Literal["training", "validation", "held_out"]
SPLITS: tuple[Split, ...] = ("training", "validation", "held_out")
HELD_OUT, VALIDATION = 1 / 8, 1 / 16  # shares of all prompts
TRIES = 256  # numbers that belong to one place of a split; (7/8)^256 = 1.4e-15
_STRETCH = 2**80  # numbers of a split
_PLACES = 2**64  # where a draw may begin


@dataclasses.dataclass(frozen=True)
class Exercise:
    """Something to be solved by a text, and all that it takes to tell whether it was. Plain data.

    Attributes:
        family: name of the family.
        level: of difficulty, from 1 on.
        prompt: what a model reads.
        answer: what is right; empty: only the scorer can tell.
        solution: a whole text that solves it, which is what supervised training learns; empty: none is known.
        scorer: how texts are judged (``dsjax.rl.rewards``).
        data: what the scorer needs beside the answer; JSON.
        question: what is asked, where the prompt wraps it in a template; empty: the prompt itself.
    """

    family: str
    level: int
    prompt: str
    answer: str
    solution: str
    scorer: str
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    question: str = ""

    @functools.cached_property
    def key(self) -> str:
        """SHA-256 of family and question, in hex: the same for two exercises if they ask the same."""
        return _sha256(f"{self.family}\0{self.question or self.prompt}")


class Family(abc.ABC):
    """Exercises of one kind, by level and number.

    Attributes:
        name: of the family.
        levels: that it has, ascending.
        form: how its questions are put, and where in a text the answer stands.
    """

    name: str
    levels: tuple[int, ...]
    form: AnswerForm

    @abc.abstractmethod
    def exercise(self, level: int, number: int) -> Exercise:
        """The exercise of a place; a pure function.

        Args:
            level: one of ``levels``.
            number: from 0 on; where there is a ``size``, below it.
        """

    def size(self, level: int) -> int | None:
        """How many numbers there are; None: no end of them (though exercises may repeat themselves)."""
        return None

    def split(self, exercise: Exercise) -> Split:
        """The side that an exercise is on."""
        return split_of(exercise.question or exercise.prompt)


def split_of(question: str) -> Split:
    """The side of a question."""
    share = int(_sha256(question)[:16], 16) / 2**64
    return "held_out" if share < HELD_OUT else "validation" if share < HELD_OUT + VALIDATION else "training"


def exercise_of(family: Family, level: int, split: Split, number: int) -> Exercise:
    """The exercise at a place of a split.

    Args:
        family, level: of it.
        split: the side.
        number: from 0 on. Of a family that has an end, the places go round.

    Raises:
        UserError: the family has no such level, or none of its exercises is on that side.
    """
    check_level(family, level)
    if family.size(level) is not None:
        if not (numbers := numbers_of(family, level, split)):
            raise _has_none(family, level, split)
        return family.exercise(level, numbers[number % len(numbers)])
    first = SPLITS.index(split) * _STRETCH + number * TRIES
    for candidate in range(first, first + TRIES):
        exercise = family.exercise(level, candidate)
        if family.split(exercise) == split:
            return exercise
    raise _has_none(family, level, split)


def draw(family: Family, level: int, split: Split, *, seed: int, num: int) -> list[Exercise]:
    """``num`` exercises of a split: the same for the same seed; another seed draws elsewhere.

    Of a family that has an end none comes twice before all have come. Others may repeat themselves on low levels.

    Raises:
        UserError: as :func:`exercise_of`.
    """
    if family.size(level) is None:
        digest = hashlib.sha256(f"{family.name}/{level}/{split}/{seed}".encode()).digest()
        first = int.from_bytes(digest[:8], "big") % _PLACES
        return [exercise_of(family, level, split, first + i) for i in range(num)]
    check_level(family, level)
    if not (numbers := numbers_of(family, level, split)):
        raise _has_none(family, level, split)
    chance = random.Random(f"{family.name}/{level}/{split}/{seed}")
    order: list[int] = []
    while len(order) < num:
        order += chance.sample(numbers, min(len(numbers), num - len(order)))
    return [family.exercise(level, number) for number in order]


def distinct(family: Family, level: int, split: Split, num: int, *, key: str = "num") -> list[Exercise]:
    """The first ``num`` exercises of a split of which no two ask the same: what an evaluation asks.

    ``key``: what says so many.

    Raises:
        UserError: there are fewer; says how many were found.
    """
    found: dict[str, Exercise] = {}
    size = family.size(level)
    most = 16 * num + 1024 if size is None else len(numbers_of(family, level, split))
    for number in range(most):
        if len(found) == num:
            break
        exercise = exercise_of(family, level, split, number)
        found.setdefault(exercise.key, exercise)
    if len(found) < num:
        raise UserError(
            f"{key} is {num}; {family.name} has {len(found)} different exercises of level {level} on the side {split!r}"
        )
    return list(found.values())


def check_level(family: Family, level: int) -> None:
    """Raises ``UserError`` for a level that a family does not have."""
    if level not in family.levels:
        raise UserError(f"level is {level}; {family.name} has levels {', '.join(map(str, family.levels))}")


@functools.lru_cache(maxsize=4096)
def numbers_of(family: Family, level: int, split: Split) -> tuple[int, ...]:
    """The numbers of a family with an end that are on one side."""
    everything = range(family.size(level) or 0)
    return tuple(number for number in everything if family.split(family.exercise(level, number)) == split)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _has_none(family: Family, level: int, split: Split) -> UserError:
    return UserError(f"{family.name} has no exercise of level {level} on the side {split!r}")
