"""How fast tasks are made and how well their hidden tests tell: python -m benchmarks.tasks [--tasks N].

For each family: milliseconds of one core for a task. Of the solutions of sibling tasks (same family and level, another
meaning) how many pass all hidden tests. Of the mutants, with one step replaced by any operation of the same types with
any parameters, how many pass; those of the same meaning are left out. Neither had a part in the choice of the tests.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator
from typing import Annotated, Any

import tyro

from dsjax.data.tasks.families import FAMILIES, LEVELS
from dsjax.data.tasks.generate import Task, draft, generate, run_code
from dsjax.data.tasks.meaning import values
from dsjax.data.tasks.operation import Step, TooLarge
from dsjax.data.tasks.values import battery


def main(tasks: Annotated[int, tyro.conf.arg(help="tasks of each family and level")] = 20) -> None:
    """Prints a table."""
    steps = every_step()
    print("| family | ms a task | siblings that pass | mutants that pass |\n|---|---:|---:|---:|")
    totals = [0, 0, 0, 0]
    for family in FAMILIES:
        [generate(family, level, 10**6) for level in LEVELS]  # compiles what every task needs
        begin = time.process_time()
        made = [[generate(family, level, index) for index in range(tasks)] for level in LEVELS]
        milliseconds = 1000 * (time.process_time() - begin) / (tasks * len(LEVELS))
        siblings, mutants = siblings_of(made), mutants_of(family, made, steps)
        totals = [a + b for a, b in zip(totals, (*siblings, *mutants), strict=True)]
        print(f"| {family} | {milliseconds:.1f} | {siblings[0]} of {siblings[1]:,} | {mutants[0]} of {mutants[1]:,} |")
    print(f"| all | | {totals[0]} of {totals[1]:,} | {totals[2]} of {totals[3]:,} |")


def every_step() -> list[Step]:
    """Every operation with every combination of its parameters."""
    found = {id(o): o for family in FAMILIES.values() for o in (*family.pool, *family.kernels)}
    return [
        Step(o, tuple(zip([name for name, _ in o.parameters], chosen, strict=True)))
        for o in found.values()
        for chosen in itertools.product(*(allowed for _, allowed in o.parameters))
    ]


def siblings_of(made: list[list[Task]]) -> tuple[int, int]:
    """How many solutions of siblings pass, of how many."""
    passed = tried = 0
    for group in made:
        functions = [run_code(task.code, task.entry_point) for task in group]
        for (task, _), (other, function) in itertools.permutations(zip(group, functions, strict=True), 2):
            if other.meaning != task.meaning:
                tried += 1
                passed += all(is_right(function, arguments, expected) for arguments, expected in task.tests)
    return passed, tried


def is_right(function: Any, arguments: tuple[Any, ...], expected: Any) -> bool:
    """Whether a function gives what is expected; an exception is no answer."""
    try:
        return function(*copy.deepcopy(arguments)) == expected
    except Exception:
        return False


def mutants_of(family: str, made: list[list[Task]], steps: list[Step]) -> tuple[int, int]:
    """How many mutants pass, of how many that mean something else."""
    passed = tried = 0
    for group in made:
        for task in group:
            drawn = draft(family, task.level, int(task.name.rsplit("/", 1)[1])).steps
            inputs = battery(drawn[0].operation.takes)
            right = values(drawn, inputs)
            expected = [result for _, result in task.tests]
            for mutant in mutants_with(drawn, steps):
                try:
                    if values(mutant, inputs) != right:
                        tried += 1
                        passed += values(mutant, [arguments for arguments, _ in task.tests]) == expected
                except TooLarge:
                    continue
    return passed, tried


def mutants_with(drawn: tuple[Step, ...], steps: list[Step]) -> Iterator[tuple[Step, ...]]:
    """The steps with one of them replaced, in every way that the types allow."""
    for at, step in enumerate(drawn):
        for other in steps:
            same = (other.operation.takes, other.operation.gives) == (step.operation.takes, step.operation.gives)
            if same and other != step:
                yield (*drawn[:at], other, *drawn[at + 1 :])


if __name__ == "__main__":
    tyro.cli(main)
