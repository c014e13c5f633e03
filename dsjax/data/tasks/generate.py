"""A task by its place: (seed, family, level, index) -> :class:`Task`, the same for ever and everywhere.

Operations are drawn until they make a sound task. Expected values are the reference solution's own, which is run as it
is printed and must agree with the operations run one by one. Hidden tests are chosen so that the wrong solutions beside
the right one fail (see `dsjax.data.tasks.meaning.mutants`).
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from dsjax.config import UserError
from dsjax.data.tasks import wording
from dsjax.data.tasks.families import FAMILIES, LEVELS, Steps
from dsjax.data.tasks.meaning import canonical, fingerprint, mutants, sound, values
from dsjax.data.tasks.operation import Step, TooLarge, outcomes, pick
from dsjax.data.tasks.values import KINDS, Arguments, battery

NUM_TESTS = 16  # hidden ones, more if it takes more to tell wrong solutions from the right one
NUM_EXAMPLES = 2
_EDGES = 4  # of the battery, always among the hidden tests
_TRIES = 2000


@dataclasses.dataclass(frozen=True)
class Task:
    """A function to be written. Plain data; ``prompt + solution`` is a program.

    name: family/level/index.
    specification: what it is to do, in English.
    entry_point: the function's name.
    prompt: signature, and docstring with the specification and examples.
    solution: the reference solution's body, indented.
    tests: hidden ones, (arguments, expected). No example is among them.
    examples: the ones in the docstring.
    operations: what the task is composed of, with parameters.
    meaning: of two tasks the same if and only if both do the same to all of a fixed battery of inputs.
    """

    name: str
    family: str
    level: int
    specification: str
    entry_point: str
    prompt: str
    solution: str
    tests: list[tuple[Arguments, Any]]
    examples: list[tuple[Arguments, Any]]
    operations: tuple[str, ...]
    meaning: str

    @property
    def code(self) -> str:
        """The reference solution as a program."""
        return self.prompt + self.solution


def generate(family: str, level: int, index: int, seed: int = 0) -> Task:
    """The task at a place.

    Args:
        family: one of `dsjax.data.tasks.families.FAMILIES`.
        level: one of 1 to 5.
        index: any number from 0 on; there is no last one, but the lower levels repeat themselves.
        seed: any; each has tasks of its own.

    Raises:
        UserError: no such family or level.
    """
    return finish(draft(family, level, index, seed))


@dataclasses.dataclass(frozen=True)
class Draft:
    """A task of which the steps are known and nothing is worded: all that is needed to know its side.

    draw: what the rest is drawn from; used once.
    """

    name: str
    family: str
    level: int
    steps: Steps
    meaning: str
    draw: random.Random


def draft(family: str, level: int, index: int, seed: int = 0) -> Draft:
    """The steps of a task; see :func:`generate`."""
    if family not in FAMILIES:
        raise UserError(f"family is {family!r}; it must be one of {', '.join(FAMILIES)}")
    if level not in LEVELS:
        raise UserError(f"level is {level}; it must be one of {', '.join(map(str, LEVELS))}")
    draw = random.Random(f"{seed}/{family}/{level}/{index}")
    for _ in range(_TRIES):
        steps = FAMILIES[family].draw(level, draw)
        outcome = sound(steps) if steps else None
        if steps and outcome:
            meaning = fingerprint(steps[0].operation.takes, outcome)
            return Draft(f"{family}/{level}/{index}", family, level, steps, meaning, draw)
    raise AssertionError(f"{family} has no sound task of level {level}")


def finish(drawn: Draft) -> Task:
    """The task that a draft, used for the first time, becomes."""
    steps, draw = drawn.steps, drawn.draw
    entry_point = pick(draw, wording.NAMES)
    said = wording.specification(steps, draw)
    solution = wording.solution(steps, draw)
    header = wording.signature(steps, entry_point)
    function = run_code(f"{header}\n{solution}", entry_point)
    examples, tests = _examples_and_tests(steps, drawn.family, function, draw)
    shown = [f">>> {entry_point}({', '.join(map(repr, a))})\n{result!r}" for a, result in examples]
    return Task(
        name=drawn.name,
        family=drawn.family,
        level=drawn.level,
        specification=said,
        entry_point=entry_point,
        prompt=f"{header}\n{wording.docstring(said, shown)}",
        solution=solution,
        tests=tests,
        examples=examples,
        operations=tuple(step.name for step in steps),
        meaning=drawn.meaning,
    )


def run_code(code: str, entry_point: str) -> Callable[..., Any]:
    """The function that a program of this package defines; never for a program from elsewhere."""
    scope: dict[str, Any] = {}
    exec(code, scope)
    return scope[entry_point]


def _examples_and_tests(
    steps: Sequence[Step], family: str, function: Callable[..., Any], draw: random.Random
) -> tuple[list[tuple[Arguments, Any]], list[tuple[Arguments, Any]]]:
    kind = steps[0].operation.takes
    known = battery(kind)
    fresh = _fresh(steps, draw, [canonical(a) for a in known])
    examples = _examples(steps, fresh)
    rest = [a for a in fresh if a not in examples]
    chosen = _telling(steps, family, [*known, *rest], draw)

    return [_case(steps, function, a) for a in examples], [_case(steps, function, a) for a in chosen]


def _case(steps: Sequence[Step], function: Callable[..., Any], arguments: Arguments) -> tuple[Arguments, Any]:
    """Arguments with what the reference solution makes of them."""
    result = function(*copy.deepcopy(arguments))
    assert [result] == values(steps, [arguments]), (steps, arguments)
    return arguments, result


def _fresh(steps: Sequence[Step], draw: random.Random, taken: list[str]) -> list[Arguments]:
    """Random inputs that are not in the battery, and that the steps can deal with."""
    found: list[Arguments] = []
    for _ in range(24):
        arguments = KINDS[steps[0].operation.takes].draw(draw)
        if canonical(arguments) not in taken:
            try:
                values(steps, [arguments])
            except TooLarge:
                continue
            taken.append(canonical(arguments))
            found.append(arguments)
    return found


def _examples(steps: Sequence[Step], fresh: Sequence[Arguments]) -> list[Arguments]:
    """Inputs for the docstring: with different results that say something, and without backslashes."""
    found: list[Arguments] = []
    outcome = values(steps, fresh)
    seen: set[str] = set()
    for preferred in (True, False):
        for arguments, result in zip(fresh, outcome, strict=True):
            plain = not any(c in repr((arguments, result)) for c in ("\\", '"""'))
            says = bool(result) and all(arguments) and canonical(result) not in seen
            if len(found) < NUM_EXAMPLES and plain and arguments not in found and (says or not preferred):
                found.append(arguments)
                seen.add(canonical(result))
    return found


def _telling(steps: Sequence[Step], family: str, pool: Sequence[Arguments], draw: random.Random) -> list[Arguments]:
    """Tests out of a pool: edges, others of as many different results as there are, and for each wrong solution that
    passes them one at which it fails, if there is one in the pool.
    """
    right = values(steps, pool)
    seen: Counter[str] = Counter(map(canonical, right[:_EDGES]))
    repeated: dict[int, int] = {}  # place -> how many of the same result come before it
    for i in sorted(range(_EDGES, len(pool)), key=lambda i: draw.random()):
        repeated[i] = seen[canonical(right[i])]
        seen[canonical(right[i])] += 1
    order = sorted(repeated, key=repeated.__getitem__)
    chosen, others = [*range(_EDGES), *order[: NUM_TESTS - _EDGES]], order[NUM_TESTS - _EDGES :]
    for mutant in mutants(steps, FAMILIES[family], draw):
        if not _fails(mutant, pool, right, chosen):
            found = _fails(mutant, pool, right, others)
            chosen += found
            others = [i for i in others if i not in found]
    return [pool[i] for i in chosen]


def _fails(steps: Sequence[Step], pool: Sequence[Arguments], right: Sequence[Any], places: Sequence[int]) -> list[int]:
    """The first of some places of a pool at which steps have another result, if there is one."""
    done = 0
    try:
        for outcome in outcomes(steps, (pool[i] for i in places)):
            if outcome != right[places[done]]:
                break
            done += 1
    except TooLarge:
        pass
    return [*places[done : done + 1]]
