"""Families for models of a few million parameters that read bytes: short questions, levels a character or two apart.

    reverse    reverse lamp        pmal
    sort       sort lamp           almp
    brackets   close ([]{(         )})
    addition   add 47+85           7+5:12 4+8+1:13                132
    chain      chain 3+4*2-5       7 14 9                         9        from left to right, modulo 23
    countdown  reach 22 from 3 8 2     3+8:11 11*2:22             (3+8)*2

On the right the work, where it helps, and the answer. Every level has more than 4,000 questions (docs/exercises.md).
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import random
import string
from collections.abc import Callable
from typing import Any

from dsjax.rl.exercises.exercise import Exercise, Family, check_level
from dsjax.rl.exercises.form import AnswerForm

MODULUS = 23  # of chains
BRACKETS = {"(": ")", "[": "]", "{": "}"}
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
PAIRS = 4  # of brackets that are closed again
LARGEST, LARGEST_TARGET = 50, 999  # of countdown's numbers, and of all that is reached on the way


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question, its answer and the work in front of it, all without form; how it is judged, and what that takes."""

    question: str
    answer: str
    work: str = ""
    scorer: str = "exact"
    data: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Letters(Family):
    """A family that a function of level and chance makes."""

    name: str
    levels: tuple[int, ...]
    ask: Callable[[int, random.Random], Asked]
    form: AnswerForm = AnswerForm()

    def exercise(self, level: int, number: int) -> Exercise:
        """See :class:`Family`."""
        check_level(self, level)
        asked = self.ask(level, random.Random(f"{self.name}/{level}/{number}"))
        return Exercise(
            family=self.name,
            level=level,
            prompt=self.form.prompt(asked.question),
            answer=asked.answer,
            solution=self.form.solution(asked.work, asked.answer),
            scorer=asked.scorer,
            data=asked.data,
            question=asked.question,
        )


def reverse(level: int, chance: random.Random) -> Asked:
    """A word of level + 2 letters, backwards."""
    word = _word(level + 2, chance)
    return Asked(f"reverse {word}\n", word[::-1])


def sort(level: int, chance: random.Random) -> Asked:
    """The letters of a word of level + 2 in the order of the alphabet."""
    word = _word(level + 2, chance)
    return Asked(f"sort {word}\n", "".join(sorted(word)))


def brackets(level: int, chance: random.Random) -> Asked:
    """Level + 1 brackets left open, among four that are closed again; the answer closes them."""
    steps = [1] * (level + 1 + PAIRS) + [-1] * PAIRS
    chance.shuffle(steps)
    while min(itertools.accumulate(steps)) < 0:
        chance.shuffle(steps)
    text, left = "", list[str]()
    for step in steps:
        if step > 0:
            left.append(chance.choice(tuple(BRACKETS)))
        text += left[-1] if step > 0 else BRACKETS[left.pop()]
    return Asked(f"close {text}\n", "".join(BRACKETS[bracket] for bracket in reversed(left)))


def addition(level: int, chance: random.Random) -> Asked:
    """Two numbers of 4, 5, 6 ... digits together; the work goes from column to column, from the right."""
    digits = level + 3
    x, y = _number(-(-digits // 2), chance), _number(digits // 2, chance)
    columns, carry = list[str](), 0
    for place in range(-(-digits // 2)):
        parts = [x // 10**place % 10, y // 10**place % 10, *([carry] if carry else [])]
        columns.append(f"{'+'.join(map(str, parts))}:{sum(parts)}")
        carry = sum(parts) // 10
    return Asked(f"add {x}+{y}\n", str(x + y), " ".join(columns))


def chain(level: int, chance: random.Random) -> Asked:
    """Level + 1 operations from left to right, each result modulo 23; the work is all results."""
    value = chance.randrange(MODULUS)
    text, results = str(value), list[str]()
    for _ in range(level + 1):
        sign, number = chance.choice(tuple(OPERATIONS)), chance.randint(2, 9)
        value = OPERATIONS[sign](value, number) % MODULUS
        text += f"{sign}{number}"
        results.append(str(value))
    return Asked(f"chain {text}\n", results[-1], " ".join(results))


def countdown(level: int, chance: random.Random) -> Asked:
    """A number to be reached from level + 1 others, each used once at the most, by + - *; any right way counts."""
    numbers, target, way, steps = _combined(level + 1, chance)
    while target in numbers:
        numbers, target, way, steps = _combined(level + 1, chance)
    shown = chance.sample(numbers, len(numbers))
    data = {"numbers": shown, "target": target, "operators": "+-*", "all": False}
    question = f"reach {target} from {' '.join(map(str, shown))}\n"
    return Asked(question, way, " ".join(steps), "arithmetic", data)


def _combined(count: int, chance: random.Random) -> tuple[list[int], int, str, list[str]]:
    """Some numbers, what they were combined to, one by one, the expression for that, and its steps."""
    numbers = [chance.randint(1, LARGEST) for _ in range(count)]
    value, way, steps, is_sum = numbers[0], str(numbers[0]), list[str](), False
    for number in numbers[1:]:
        results = {sign: operation(value, number) for sign, operation in OPERATIONS.items()}
        sign = chance.choice([sign for sign, result in results.items() if 1 <= result <= LARGEST_TARGET])
        way = f"({way})" if sign == "*" and is_sum else way
        is_sum = sign != "*"
        steps.append(f"{value}{sign}{number}:{results[sign]}")
        value, way = results[sign], f"{way}{sign}{number}"
    return numbers, value, way, steps


def _word(length: int, chance: random.Random) -> str:
    return "".join(chance.choice(string.ascii_lowercase) for _ in range(length))


def _number(digits: int, chance: random.Random) -> int:
    return chance.randrange(10 ** (digits - 1), 10**digits)


EIGHT, SIX = tuple(range(1, 9)), tuple(range(1, 7))
LETTERS = (
    Letters("reverse", EIGHT, reverse),
    Letters("sort", EIGHT, sort),
    Letters("brackets", EIGHT, brackets),
    Letters("addition", EIGHT, addition),
    Letters("chain", EIGHT, chain),
    Letters("countdown", SIX, countdown),
)
