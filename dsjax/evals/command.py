"""``dsjax eval``: which evaluation of a run is asked for."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Literal, cast

from dsjax.config import UserError

Task = Literal["", "report", "exercises", "needle", "repair", "humaneval", "mbpp", "tasks"]
PROGRAM_TOKENS = 384  # of a program at the most, if not said

_PROGRAMS = ("humaneval", "mbpp", "tasks")
_SOLUTIONS = ("exercises", *_PROGRAMS)
# The tasks that an option says something about; with others it is refused.
GOES_WITH: dict[str, tuple[str, ...]] = {
    "samples": ("report", "needle", *_SOLUTIONS),
    "length": ("needle",),
    "k": _SOLUTIONS,
    "problems": _PROGRAMS,
    "exercises": ("exercises",),
    "limit": ("repair", *_SOLUTIONS),
    "max_tokens": _SOLUTIONS,
    "temperature": _SOLUTIONS,
    "grammar": _PROGRAMS,
    "chat": _PROGRAMS,
    "seed": ("repair", *_SOLUTIONS),
    "output": ("repair", *_SOLUTIONS),
}


@dataclasses.dataclass(frozen=True)
class Request:
    """The options of the command, as ``dsjax eval --help`` tells them; ``folder`` is the run."""

    folder: pathlib.Path
    task: Task = ""
    samples: int | None = None
    length: int = 0
    k: tuple[int, ...] = (1,)
    problems: str = ""
    exercises: str = ""
    limit: int = 0
    max_tokens: int | None = None
    temperature: float | None = None
    grammar: bool = False
    chat: bool = False
    seed: int | None = None
    output: pathlib.Path | None = None
    quiet: bool = False

    def check(self) -> None:
        """Raises UserError: a value is out of range, or does not go with another."""
        if self.samples is not None and self.samples < 1:
            raise UserError(f"--samples is {self.samples}; it must be at least 1")
        for name, number in (("length", self.length), ("limit", self.limit)):
            if number < 0:
                raise UserError(f"--{name} is {number}; it must be at least 0")
        self.refuse_options(self.task or ("exercises" if self.exercises else ""))

    def refuse_options(self, task: str) -> None:
        """Raises UserError: an option was given that says nothing about a task; empty: about neither default."""
        tasks = (task,) if task else ("report", "exercises")
        for field in dataclasses.fields(self):
            known = GOES_WITH.get(field.name, tasks)
            if getattr(self, field.name) != field.default and not set(tasks) & set(known):
                name = field.name.replace("_", "-")
                raise UserError(f"--{name} does not go with --task {' or '.join(tasks)}, but with {', '.join(known)}")


def run(request: Request) -> int:
    """Evaluates; returns the exit code.

    Raises:
        UserError: there is no such run, or it can not be evaluated in that way.
    """
    from dsjax.evals.exercises import refuse_without_documents, task_of

    folder, output, quiet = request.folder, request.output, request.quiet
    task = request.task or ("exercises" if request.exercises else task_of(folder))
    request.refuse_options(task)
    if task in ("report", "needle", "repair"):
        refuse_without_documents(folder, task)
    if task == "exercises":
        from dsjax.evals.exercises import HeldOutExercises, evaluate_exercises

        exercises = HeldOutExercises(
            request.k, request.samples or 0, request.limit, request.max_tokens, request.temperature, request.seed,
            request.exercises,
        )  # fmt: skip
        evaluate_exercises(folder, exercises, output=output, quiet=quiet)
    elif task == "needle":
        from dsjax.evals.needle_text import evaluate_needle

        evaluate_needle(folder, length=request.length, num_samples=request.samples or 64, quiet=quiet)
    elif task == "repair":
        from dsjax.evals.repair import evaluate_repair

        evaluate_repair(folder, limit=request.limit, seed=request.seed or 0, output=output)
    elif task == "report":
        from dsjax.evals.report import evaluate_run

        evaluate_run(folder, num_samples=request.samples or 64, quiet=quiet)
    else:
        from dsjax.evals.written_programs import Benchmark, WrittenPrograms, evaluate_programs

        max_tokens = PROGRAM_TOKENS if request.max_tokens is None else request.max_tokens
        programs = WrittenPrograms(
            cast(Benchmark, task), request.k, request.samples or 0, request.problems, request.limit, max_tokens,
            request.temperature, request.grammar, request.chat, seed=request.seed or 0,
        )  # fmt: skip
        evaluate_programs(folder, programs, output=output, quiet=quiet)
    return 0
