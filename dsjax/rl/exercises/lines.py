r"""Exercises from files of JSON lines: GSM8K's form, MATH's, or plain ones; families ``file/NAME``.

    GSM8K   {"question": "...", "answer": "work <<2*3=6>> ... #### 6"}                      one level
    MATH    {"problem": "...", "solution": "... \\boxed{6} ...", "level": "Level 3", "type": "Algebra"}
    plain   {"question": "...", "answer": "6", "level": 2}                                   an answer without a mark

and programming problems as ``dsjax.rl.programs`` reads them.

NAME is the file's without its ending, and of MATH's, NAME/TYPE in small letters. Answers are judged as mathematics, but
for words in the other two forms (``dsjax.rl.answers.words``); in those ``scorer`` says otherwise. Calculator notes
(<<...>>) are left out of work.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any

from dsjax.config import UserError
from dsjax.rl.answers import boxed, words
from dsjax.rl.exercises.exercise import Exercise, Family, check_level
from dsjax.rl.exercises.form import AnswerForm
from dsjax.rl.exercises.programs import Problems, asked
from dsjax.rl.programs import Problem, read_problems

PREFIX = "file/"
MARK = "####"  # GSM8K's
SCORERS = ("math", "exact", "words")
PROGRAM_FIELDS = {"entry_point", "test_list"}  # which of them tells of programming problems
UNKNOWN_LEVEL = "Level ?"  # of two lines of MATH, which are left out


@dataclasses.dataclass(frozen=True)
class Line:
    """What a line says."""

    family: str
    level: int
    question: str
    work: str
    answer: str
    scorer: str


@dataclasses.dataclass(frozen=True, eq=False)
class Lines(Family):
    """The lines of a file that belong together; each is there once."""

    name: str
    levels: tuple[int, ...]
    lines: tuple[Line, ...]
    form: AnswerForm = AnswerForm()

    @functools.cached_property
    def _by_level(self) -> dict[int, list[Line]]:
        return {level: [line for line in self.lines if line.level == level] for level in self.levels}

    def exercise(self, level: int, number: int) -> Exercise:
        """See :class:`Family`; numbers are places in the file."""
        check_level(self, level)
        line = self._by_level[level][number]
        return Exercise(
            family=self.name,
            level=level,
            prompt=self.form.prompt(f"{line.question}\n"),
            answer=line.answer,
            solution=self.form.solution(line.work, line.answer),
            scorer=line.scorer,
            question=line.question,
        )

    def size(self, level: int) -> int:
        """How many lines of the level there are."""
        check_level(self, level)
        return len(self._by_level[level])


def read_families(path: str | pathlib.Path, form: AnswerForm) -> dict[str, Family]:
    """The families of a file, by name; also compressed, as .gz.

    Raises:
        UserError: the file can not be read, has no exercise, or a line of it is none; names file and line.
    """
    path = pathlib.Path(path)
    name = PREFIX + path.name.partition(".")[0]
    found: dict[str, dict[str, Line]] = {}
    for where, fields in _records(path):
        if not found and not PROGRAM_FIELDS.isdisjoint(fields):
            problems = dict[str, Problem]()
            for problem in read_problems(path):
                problems.setdefault(asked(name, 1, problem, form, {}).question, problem)
            return {name: Problems(name, tuple(problems.values()), form)}
        line = _line(where, fields, name)
        if line is not None:
            found.setdefault(line.family, {}).setdefault(line.question, line)
    if not found:
        raise UserError(f"{path} has no exercises")
    return {
        family: Lines(family, tuple(sorted({line.level for line in lines.values()})), tuple(lines.values()), form)
        for family, lines in found.items()
    }


def _records(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object, and where it stands; a file may also be one JSON list."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} can not be read: {error}") from None
    if data.lstrip()[:1] == b"[":
        values = _json(str(path), data)
        found = [(f"{path}, item {number}", value) for number, value in enumerate(values)]
    else:
        lines = enumerate(data.split(b"\n"), 1)
        found = [(where := f"{path}, line {number}", _json(where, line)) for number, line in lines if line.strip()]
    for where, value in found:
        if not isinstance(value, dict):
            raise UserError(f"{where}: a JSON object was expected, found {type(value).__name__}")
        yield where, value


def _json(where: str, data: bytes) -> Any:
    try:
        value = json.loads(data.decode("utf-8"))
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # JSON may spell half of a surrogate pair
    except UnicodeError:
        raise UserError(f"{where}: it is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: it is no JSON ({str(error)[:100]})") from None
    return value


def _line(where: str, fields: dict[str, Any], family: str) -> Line | None:
    """What an object says; None for one whose level nobody knows."""
    if "problem" in fields:
        question, work = _text(where, fields, "problem"), _text(where, fields, "solution")
        answer = boxed(work) if fields.get("answer") is None else _text(where, fields, "answer")
        if not answer:
            raise UserError(f"{where}: solution has no \\boxed{{...}} with an answer, and there is no answer beside it")
        kind = fields.get("type", fields.get("subject"))
        if kind is not None:
            family += f"/{_text(where, {'type': kind}, 'type').lower()}"
        scorer = "math"
    elif "question" in fields:
        question, work, answer = _text(where, fields, "question"), "", _text(where, fields, "answer")
        if MARK in answer:
            work, _, answer = answer.rpartition(MARK)
            work, answer = re.sub(r"<<[^<>]*>>", "", work).strip(), answer.strip()
            if not answer:
                raise UserError(f"{where}: there is nothing behind the last {MARK} of answer")
        scorer = str(fields.get("scorer", "math" if words(answer) is None else "words"))
    else:
        raise UserError(
            f"{where} has neither question and answer (GSM8K's form) nor problem and solution (MATH's); it has"
            f" {', '.join(fields) or 'nothing'}"
        )
    if scorer not in SCORERS:
        raise UserError(f"{where}: scorer is {scorer!r:.60}; it must be one of {', '.join(SCORERS)}")
    level = _level(where, fields.get("level", 1))
    return None if level is None else Line(family, level, question, work, answer, scorer)


def _level(where: str, value: Any) -> int | None:
    if value == UNKNOWN_LEVEL:
        return None
    digits = re.fullmatch(r"(?:Level )?(\d{1,3})", str(value), re.ASCII)
    if isinstance(value, bool) or digits is None or not int(digits[1]):
        raise UserError(f"{where}: level is {value!r:.60}; it must be a whole number from 1 to 999, or 'Level 3'")
    return int(digits[1])


def _text(where: str, fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        found = "missing" if name not in fields else "empty" if value == "" else repr(value)[:60]
        raise UserError(f"{where}: {name} is {found}; it must be a text")
    return value.strip()
