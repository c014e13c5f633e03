"""Correct solutions that were seen, and what one is worth for being new.

    bonus = 1 / (m (1 + n))      n: how often this solution of this exercise was seen before
                                 m: how many texts of the batch have it

This is exploration by counts (Strehl & Littman 2008; Bellemare et al. 2016, arXiv 1606.01868) with what the text *does*
in place of a state, as novelty search has it (Lehman & Stanley 2011): a solution that differs in form alone is the same
one. Only correct texts have a bonus, or to be new would be worth something without being right. Distances between
solutions, novelty search's own measure, would need a metric for every family of exercises; counts need equality alone.

An archive is plain data: {exercise: {solution: times seen}}, both by hash, the ones seen last at the end. What goes
over its size is what was seen longest ago.
"""

from __future__ import annotations

import ast
import collections
import copy
import dataclasses
import hashlib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

from dsjax.config import PositiveInt
from dsjax.data.build.syntax import parsed

Archive = Mapping[str, Mapping[str, int]]


@dataclasses.dataclass(frozen=True)
class ArchiveConfig:
    """Its size.

    Attributes:
        exercises: that are remembered.
        solutions: of each.
    """

    exercises: PositiveInt = 4096
    solutions: PositiveInt = 32


@dataclasses.dataclass(frozen=True)
class Found:
    """A text that was judged.

    Attributes:
        exercise: its key.
        solution: what the text comes to, in a form in which equal ones are equal (:func:`plain_form`,
            :func:`python_form`).
        correct: whether it is; None: unknown.
    """

    exercise: str
    solution: str
    correct: bool | None

    @property
    def place(self) -> tuple[str, str]:
        """Where it stands in an archive."""
        return self.exercise, hashlib.sha256(self.solution.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def plain_form(text: str) -> str:
    """A text without what makes no other solution of it: width and case of letters, white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def python_form(code: str) -> str:
    """A program without what makes no other solution of it: comments, layout, strings that stand for themselves, and
    the names of what it defines. What does not parse is taken as a text."""
    found = parsed(code)
    if isinstance(found, str):
        return plain_form(code)
    try:
        tree = copy.deepcopy(found)
        names = dict[str, str]()
        for node, _, name in _names(tree):
            if not isinstance(node, ast.Name | ast.keyword) or isinstance(getattr(node, "ctx", None), ast.Store):
                names.setdefault(name, f"${len(names)}")
        for node, field, name in _names(tree):
            setattr(node, field, names.get(name, name))
        for node in ast.walk(tree):
            if isinstance(body := getattr(node, "body", None), list):
                node.body = [line for line in body if not _is_string(line)]  # type: ignore[attr-defined]
        return ast.dump(tree)
    except RecursionError:
        return plain_form(code)


def _names(tree: ast.AST) -> Iterator[tuple[ast.AST, str, str]]:
    """What is named, where: (node, field, name)."""
    for node in ast.walk(tree):
        for field in ("id", "arg", "name", "rest"):
            if isinstance(name := getattr(node, field, None), str) and not isinstance(node, ast.alias):
                yield node, field, name


def _is_string(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)


def bonuses(archive: Archive, found: Sequence[Found]) -> list[float]:
    """What each text is worth for being new, from 0 to 1; of the texts of one batch, whose order does not matter."""
    together = collections.Counter(one.place for one in found if one.correct)
    return [
        1 / (together[one.place] * (1 + archive.get(one.exercise, {}).get(one.place[1], 0))) if one.correct else 0.0
        for one in found
    ]


def remembered(cfg: ArchiveConfig, archive: Archive, found: Sequence[Found]) -> dict[str, dict[str, int]]:
    """The archive with the correct ones of a batch, whose order does not matter; the one given is left as it is."""
    new = dict[str, Mapping[str, int]](archive)
    together = collections.Counter(one.place for one in found if one.correct)
    for (exercise, solution), times in sorted(together.items()):
        solutions = dict(new.pop(exercise, {}))
        solutions[solution] = solutions.pop(solution, 0) + times
        new[exercise] = dict(list(solutions.items())[-cfg.solutions :])
    return {exercise: dict(solutions) for exercise, solutions in list(new.items())[-cfg.exercises :]}
