"""How a model is asked for a program, and where the program is in what it wrote."""

from __future__ import annotations

import ast
import re

from dsjax.data.build.syntax import lines_of
from dsjax.data.structure.nesting import Nesting
from dsjax.data.tasks import Task
from dsjax.rl.programs import Problem

ASKED = "Write a Python function. Answer with one block of code.\n\n"  # in front of a problem, of a user's message


def problem_of(task: Task) -> Problem:
    """A generated task as something to be solved."""
    return Problem(task.name, task.prompt, task.prompt, "", task.entry_point, task.tests, task.solution)


def docstring(problem: Problem) -> str:
    """What a base model is shown of a problem that begins no function: its text, and how the function is called."""
    shown = problem.text.strip()
    if isinstance(problem.tests, str):
        first = next((node for node in ast.walk(ast.parse(problem.tests)) if isinstance(node, ast.Assert)), None)
        shown += f"\n{ast.get_source_segment(problem.tests, first)}" if first is not None else ""
    elif problem.entry_point not in shown:
        shown += f"\nThe function is called {problem.entry_point}."
    quotes = "'''" if '"""' in shown else '"""'
    shown = shown.replace(quotes, "".join(f"\\{quote}" for quote in quotes))  # if it has both
    prefix = "r" if "\\" in shown else ""
    return f"{prefix}{quotes}\n{shown}\n{quotes}\n"


def _begin_statements(lines: list[str]) -> list[bool]:
    """Whether a statement may begin with each line: no string and no bracket is open."""
    found, nesting = list[bool](), Nesting()
    for line in lines:
        found.append(nesting.is_outside)
        nesting.read_any(line.encode(errors="replace"))
    return found


def cut_body(text: str, indent: int, *, ended: bool) -> tuple[str, bool]:
    """The body at the front of a continuation, and whether it is finished.

    A body ends before the first statement that is indented no deeper than ``def``; ``ended`` says that the text stopped
    by itself. An unfinished body loses its last line, which may be cut.
    """
    lines = lines_of(text)
    for number, (line, begins) in enumerate(zip(lines, _begin_statements(lines), strict=True)):
        content = line.strip()
        complete = line.endswith(("\n", "\r")) or ended
        dedents = bool(content) and not content.startswith("#") and len(line) - len(line.lstrip()) <= indent
        if begins and complete and dedents:
            return "".join(lines[:number]), True
    return ("".join(lines), True) if ended else ("".join(lines[:-1]), False)


def cut_program(text: str, *, ended: bool) -> str:
    """The definitions, imports and assignments at the front of a text: what a base model writes before it goes on to
    call them, or to the next problem."""
    lines = lines_of(text)
    if not ended and lines and not lines[-1].endswith("\n"):
        lines = lines[:-1]
    for number, (line, begins) in enumerate(zip(lines, _begin_statements(lines), strict=True)):
        if begins and re.match(r"(assert|print|if __name__)\b|'''|\"\"\"|```|# In\[", line):
            return "".join(lines[:number])
    return "".join(lines)


def program_of(problem: Problem, text: str, ended: bool, chat: bool = False) -> str:
    """The program in a model's text, which had come to its end or not."""
    if chat:
        block = re.search(r"```[^\n]*\n(.*?)(```|\Z)", text, re.DOTALL)
        begun = re.search(rf"^(async )?def {re.escape(problem.entry_point)}\b", problem.prefix, re.MULTILINE)
        # The function is written whole; what the problem has in front of its own beginning of it goes ahead.
        return (problem.prefix[: begun.start()] if begun else "") + (block[1] if block else text)
    if problem.prefix:
        return problem.prefix + cut_body(text, 0, ended=ended)[0]
    return cut_program(text, ended=ended)
