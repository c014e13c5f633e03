"""The generated programming tasks (``dsjax.data.tasks``) as families ``program/NAME``, and problems from files.

Sides of generated tasks are those of the tasks themselves: what a task means decides (docs/tasks.md). Held-out
compositions are held out here, whole held-out families have nothing to train on, and of the rest a hash of the meaning
gives a part to validation.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dsjax.data.tasks import Split as TaskSplit
from dsjax.data.tasks import Task, generate
from dsjax.data.tasks.families import FAMILIES, LEVELS
from dsjax.rl import plain
from dsjax.rl.completions import ASKED, docstring, problem_of
from dsjax.rl.exercises.exercise import Exercise, Family, Split, check_level, split_of
from dsjax.rl.exercises.form import AnswerForm
from dsjax.rl.programs import Problem
from dsjax.rl.sandbox import Program

PREFIX = "program/"


@dataclasses.dataclass(frozen=True, eq=False)
class Programs(Family):
    """Tasks of one family. In the plain form a function's beginning is gone on with; the answer has no mark."""

    name: str
    levels: tuple[int, ...] = LEVELS
    form: AnswerForm = AnswerForm()
    sides: TaskSplit = TaskSplit()

    def exercise(self, level: int, number: int) -> Exercise:
        """See :class:`Family`."""
        check_level(self, level)
        task = generate(self.name.removeprefix(PREFIX), level, number)
        return asked(self.name, level, problem_of(task), self.form, {"side": self._side(task)})

    def split(self, exercise: Exercise) -> Split:
        """The side that the task's meaning gives it."""
        return exercise.data["side"]

    def _side(self, task: Task) -> Split:
        if self.sides.side(task) != "training":
            return "held_out"
        # Another hash than the one that chose the training side: that one has nothing left in some of its shares.
        return "validation" if split_of(f"validation/{task.meaning}") == "validation" else "training"


@dataclasses.dataclass(frozen=True, eq=False)
class Problems(Family):
    """The problems of a file of HumanEval's, MBPP's or the tasks' own form (:mod:`dsjax.rl.programs`), each once; one
    level."""

    name: str
    problems: tuple[Problem, ...]
    form: AnswerForm = AnswerForm()
    levels: tuple[int, ...] = (1,)

    def exercise(self, level: int, number: int) -> Exercise:
        """See :class:`Family`; numbers are places in the file."""
        check_level(self, level)
        return asked(self.name, level, self.problems[number], self.form, {})

    def split(self, exercise: Exercise) -> Split:
        """The side of its question in the plain form, whatever the template is."""
        return split_of(question_of(problem(exercise)))

    def size(self, level: int) -> int:
        """How many problems there are."""
        return len(self.problems)


def names() -> tuple[str, ...]:
    """All families of generated tasks."""
    return tuple(f"{PREFIX}{name}" for name in FAMILIES)


def question_of(problem: Problem) -> str:
    """What is asked in the plain form: a function's beginning, or else the text as a docstring."""
    return problem.prefix or docstring(problem)


def asked(family: str, level: int, problem: Problem, form: AnswerForm, more: dict[str, Any]) -> Exercise:
    """A problem as an exercise; ``more`` goes into its data."""
    if form.template == "think":
        question, code = f"{ASKED}{problem.text}", f"{problem.prefix}{problem.solution}".rstrip()
        solution = form.solution("", f"```python\n{code}\n```")
    else:
        question, solution = question_of(problem), problem.solution
    fields = {field: getattr(problem, field) for field in ("text", "prefix", "suffix", "entry_point")}
    limits = {"timeout": problem.timeout, "memory_mb": problem.memory_mb}
    return Exercise(
        family=family,
        level=level,
        prompt=form.prompt(question) if form.template == "think" else question,
        answer="",
        solution=solution if problem.solution else "",
        scorer="program",
        data={**fields, "tests": plain.encode(problem.tests), **limits, **more},
        question=question,
    )


def program(exercise: Exercise, code: str) -> Program:
    """What the sandbox is given for the whole source of a program."""
    data = exercise.data
    code = f"{code}\n{data['suffix']}\n" if data["suffix"] else code
    return Program(code, plain.decode(data["tests"]), data["entry_point"], data["timeout"], data["memory_mb"])


def problem(exercise: Exercise) -> Problem:
    """The problem that an exercise was made of, without its solution."""
    data = exercise.data
    return Problem(
        name=exercise.key,
        text=data["text"],
        prefix=data["prefix"],
        suffix=data["suffix"],
        entry_point=data["entry_point"],
        tests=plain.decode(data["tests"]),
        timeout=data["timeout"],
        memory_mb=data["memory_mb"],
    )
