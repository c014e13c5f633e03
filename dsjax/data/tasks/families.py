"""Families of tasks: which operations they are made of, and how a level is made.

The level is the number of operations composed; of classes, of methods and operations. A family begins with a type of
its own, or shares it with another (text: strings and parsing; lists: lists and dynamic programming).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping

from dsjax.data.tasks import operations_lists, operations_recursion, operations_tables, operations_texts
from dsjax.data.tasks.machines import draw_machine
from dsjax.data.tasks.operation import Operation, Step, pick
from dsjax.data.tasks.operations_readers import READERS

LEVELS = (1, 2, 3, 4, 5)
Steps = tuple[Step, ...]


@dataclasses.dataclass(frozen=True)
class Family:
    """See the module.

    takes: the type of the input.
    kernels: one of them is in every task; empty: any operation may be.
    first: whether the kernel stands in front of all others.
    pool: the other operations.
    """

    takes: str
    pool: tuple[Operation, ...]
    kernels: tuple[Operation, ...] = ()
    first: bool = True

    def draw(self, level: int, draw: random.Random) -> Steps | None:
        """Steps for a level; None if what was drawn comes to no end."""
        place = -1 if not self.kernels else 0 if self.first else int(draw.random() * level)
        steps: list[Step] = []
        kind = self.takes
        for number in range(level):
            source = self.kernels if number == place else self.pool
            fitting = [o for o in source if o.takes == kind and self._goes_on(o.gives, number, level, place)]
            if not fitting:
                return None
            steps.append(pick(draw, fitting).step(draw))
            kind = steps[-1].operation.gives
        return tuple(steps)

    def _goes_on(self, kind: str, number: int, level: int, place: int) -> bool:
        """Whether a value of this type can be worked on until the level is reached."""
        if number == level - 1:
            return True
        if number < place and kind != self.takes:
            return False
        return any(o.takes == kind for o in self.pool)

    def alternatives(self, step: Step) -> list[Operation]:
        """Other operations of the same types."""
        same = (step.operation.takes, step.operation.gives)
        return [o for o in (*self.kernels, *self.pool) if (o.takes, o.gives) == same]


class MachineFamily(Family):
    """Classes: a machine of level + 1 methods up to level 3; from level 4 on operations follow."""

    def draw(self, level: int, draw: random.Random) -> Steps | None:
        after = max(level - 3, 0)
        rest = FAMILIES["list"].draw(after, draw) if after else ()
        return None if rest is None else (draw_machine(draw, level + 1 - after), *rest)

    def alternatives(self, step: Step) -> list[Operation]:
        if step.operation.takes != "commands":
            return FAMILIES["list"].alternatives(step)
        draw = random.Random(step.name)
        size = step.name.count(",") + 1
        return [draw_machine(draw, size).operation for _ in range(8)]


_LISTS = operations_lists.LISTS + operations_lists.TOTALS
_NUMBERS = operations_lists.NUMBERS
_TEXTS = operations_texts.TEXTS + operations_texts.TEXT_TOTALS + operations_texts.SPLITS
_WORDS = operations_texts.WORDS + operations_texts.WORD_RESULTS
_COUNTS = operations_tables.COUNTS + operations_tables.COUNT_RESULTS
_NESTED = operations_recursion.NESTED + operations_recursion.NESTED_RESULTS

FAMILIES: Mapping[str, Family] = {
    "string": Family("str", _TEXTS + _WORDS + _COUNTS + _LISTS),
    "list": Family("ints", _LISTS + _NUMBERS),
    "dict": Family("counts", _COUNTS + _WORDS + _LISTS),
    "number": Family("int", _NUMBERS + operations_lists.EXPANSIONS + _LISTS),
    "class": MachineFamily("commands", ()),
    "recursion": Family("nested", _NESTED + _LISTS + _NUMBERS),
    "dynamic_programming": Family("ints", _LISTS + _NUMBERS, kernels=operations_recursion.PROGRAMMES, first=False),
    "parsing": Family("str", _LISTS + _WORDS + _COUNTS + operations_texts.TEXTS + _NUMBERS, kernels=READERS),
    "matrix": Family("matrix", operations_tables.MATRICES + operations_tables.MATRIX_RESULTS + _LISTS),
    "pairing": Family("pair", _LISTS + _NUMBERS, kernels=operations_tables.PAIRS + operations_tables.PAIR_RESULTS),
}
