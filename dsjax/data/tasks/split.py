"""Which tasks are for training and which are held out, so that nothing that is tested was trained on.

The side of a task is a function of what it means (`Task.meaning`), not of how it is put together or worded: so two
compositions that do the same are on one side, whatever they look like. A specification says what a task means, so none
is on both sides either. Whole families are held out by type: another family that has the same type could make the same
function.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from dsjax.config import Seed, Share, UserError
from dsjax.data.tasks.families import FAMILIES, LEVELS
from dsjax.data.tasks.generate import Draft, Task, draft, finish

Side = Literal["training", "composition", "family"]
_MOST_TRIES = 1000  # places looked at for one task of a side


@dataclasses.dataclass(frozen=True)
class Split:
    """How tasks are divided.

    held_out_share: of the meanings in families that are trained.
    held_out_families: families that are not trained at all.
    salt: another one divides meanings in another way.
    """

    held_out_share: Share = 0.2
    held_out_families: tuple[str, ...] = ("matrix", "pairing")
    salt: Seed = 0

    def validate(self) -> None:
        """Raises:
        UserError: an unknown family, or one that shares its type with a family that is trained.
        """
        for name in self.held_out_families:
            if name not in FAMILIES:
                raise UserError(f"held_out_families has {name!r}; families are {', '.join(FAMILIES)}")
            for other, family in FAMILIES.items():
                if family.takes == FAMILIES[name].takes and other not in self.held_out_families:
                    raise UserError(
                        f"held_out_families has {name!r} and not {other!r}, which works on the same values and can make"
                        " the same functions; hold out both or neither"
                    )

    def side(self, task: Task | Draft) -> Side:
        """Where a task belongs: "training", or held out as a "composition" or with its "family"."""
        if task.family in self.held_out_families:
            return "family"
        digest = hashlib.sha256(f"{self.salt}/{task.meaning}".encode()).digest()
        return "composition" if int.from_bytes(digest[:8], "big") < self.held_out_share * 2**64 else "training"


def stream(
    side: Side,
    *,
    split: Split = Split(),
    families: Sequence[str] = (),
    levels: Sequence[int] = LEVELS,
    seed: int = 0,
    distinct: bool = False,
) -> Iterator[Task]:
    """Tasks of one side without end, families and levels in turn.

    Args:
        side: which.
        families: which; none: all that have tasks on this side.
        levels: which.
        distinct: no two of the same meaning; then a family and level end when no more are found.

    Raises:
        UserError: a family or level that is not there, or that has no task on this side.
    """
    split.validate()
    held = set(split.held_out_families)
    chosen = list(families) or [name for name in FAMILIES if (name in held) == (side == "family")]
    for name in chosen:
        if name not in FAMILIES or (name in held) != (side == "family"):
            allowed = [n for n in FAMILIES if (n in held) == (side == "family")]
            raise UserError(f"families has {name!r}; with tasks of side {side!r} there are {', '.join(allowed)}")
    places = {(name, level): 0 for level in levels for name in chosen}
    seen: set[str] = set()
    while places:
        for place in list(places):
            for index in range(places[place], places[place] + _MOST_TRIES):
                drawn = draft(*place, index, seed)
                if split.side(drawn) == side and not (distinct and drawn.meaning in seen):
                    break
            else:
                if not (distinct and seen):
                    raise UserError(f"{place[0]} of level {place[1]} has no task of side {side!r}")
                del places[place]
                continue
            places[place] = index + 1
            if distinct:
                seen.add(drawn.meaning)
            yield finish(drawn)


def check_disjoint(training: Iterable[Task], held_out: Iterable[Task]) -> None:
    """Compares two sets of tasks by hashes of meanings, specifications, prompts and programs.

    Raises:
        UserError: one is in both; says which.
    """
    known: dict[str, str] = {}
    for task in training:
        for mark in _marks(task):
            known.setdefault(mark, task.name)
    for task in held_out:
        for mark in _marks(task):
            if mark in known:
                raise UserError(f"{known[mark]} is trained on, and {task.name}, held out, has the same {mark[:60]}")


def _marks(task: Task) -> Iterator[str]:
    yield f"meaning {task.meaning}"
    yield f"specification {' '.join(task.specification.lower().split())}"
    yield f"prompt {task.prompt}"
