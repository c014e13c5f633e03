"""Problems from files, HumanEval's, MBPP's and plain JSON lines, and the programs that solutions of them make.

    problems = read_problems("HumanEval.jsonl.gz")
    verdicts = Sandbox().check([problem.program(completion) for problem, completion in ...])

The three kinds are told apart by the fields of a line:

- HumanEval: task_id, prompt, canonical_solution, test, entry_point. A completion goes on behind the prompt. What
  stands in the prompt in front of the function goes into the tests as well, so that they never ask the program for
  it.
- MBPP: task_id, text or prompt, code, test_list, test_setup_code or test_imports (mbpp.jsonl, and
  sanitized-mbpp.json, which is one list). A completion is a whole program. Its tests are assertions that call it by
  name.
- plain: entry_point, tests (source with ``check(candidate)`` or pairs [arguments, expected]), and as wanted prompt,
  solution or code, name, timeout, memory_mb.
"""

from __future__ import annotations

import ast
import dataclasses
import gzip
import json
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any

from dsjax.config import UserError
from dsjax.data.build.syntax import lines_of
from dsjax.rl.sandbox import TOO_DEEP, Program, validate


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something to be solved by a function.

    Attributes:
        name: of the problem, in its file.
        text: what a model is told.
        prefix: code that a completion goes on behind; may be empty.
        suffix: code that the tests need behind it; may be empty.
        entry_point: name of the function.
        tests: as in ``Program``.
        solution: a completion that is right, if the file has one.
        timeout: seconds.
        memory_mb: MiB.
    """

    name: str
    text: str
    prefix: str
    suffix: str
    entry_point: str
    tests: Any
    solution: str = ""
    timeout: float = 2.0
    memory_mb: float = 512

    def program(self, completion: str) -> Program:
        """The program that a completion makes."""
        code = self.prefix + completion + (f"\n{self.suffix}\n" if self.suffix else "")
        return Program(code, self.tests, self.entry_point, self.timeout, self.memory_mb)


def read_problems(path: str | pathlib.Path) -> list[Problem]:
    """All problems of a file: JSON lines, or one JSON list; also compressed, as .gz.

    Raises ``UserError``, which names file and line, for what is none.
    """
    problems = []
    for where, fields in _records(pathlib.Path(path)):
        problem = _problem(where, fields)
        validate(problem.program(problem.solution), where)
        problems.append(problem)
    if not problems:
        raise UserError(f"{path} has no problems")
    return problems


def _records(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object, and where it stands."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} can not be read: {error}") from None
    if text.lstrip().startswith("["):
        found = [(f"{path}, item {i}", item) for i, item in enumerate(_json(str(path), text))]
    else:
        lines = enumerate(text.split("\n"), 1)
        found = [(where := f"{path}, line {number}", _json(where, line)) for number, line in lines if line.strip()]
    for where, item in found:
        if not isinstance(item, dict):
            raise UserError(f"{where} is a {type(item).__name__}; a problem is a JSON object")
        yield where, item


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON: {error}") from None


def _problem(where: str, fields: dict[str, Any]) -> Problem:
    if "test_list" in fields:
        return _mbpp(where, fields)
    if "canonical_solution" in fields or "test" in fields:
        return _humaneval(where, fields)
    return _plain(where, fields)


def _humaneval(where: str, fields: dict[str, Any]) -> Problem:
    prompt, entry_point = _text(where, fields, "prompt"), _text(where, fields, "entry_point")
    tests = _context(where, prompt, entry_point) + _text(where, fields, "test")
    name, solution = str(fields.get("task_id", where)), _text(where, fields, "canonical_solution", "")
    return Problem(name, prompt, prompt, "", entry_point, tests, solution)


def _context(where: str, prompt: str, entry_point: str) -> str:
    """What stands in a prompt in front of its function: imports, and functions that tests may call."""
    lines = lines_of(prompt)
    for node in _body(f"{where}: prompt", prompt + "\n    pass\n"):  # it may end in a signature without a docstring
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == entry_point:
            return "".join(lines[: min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1])
    raise UserError(f"{where}: prompt defines no function {entry_point}, which is the entry_point")


def _body(where: str, code: str) -> list[ast.stmt]:
    try:
        return ast.parse(code).body
    except SyntaxError as error:
        raise UserError(f"{where}: {error.msg} in line {error.lineno}") from None
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    except (RecursionError, MemoryError):
        raise UserError(f"{where}: {TOO_DEEP}") from None


def _mbpp(where: str, fields: dict[str, Any]) -> Problem:
    key = "text" if "text" in fields else "prompt"
    text, code, lines = _text(where, fields, key), _text(where, fields, "code", ""), _lines(where, fields, "test_list")
    setup = [_text(where, fields, "test_setup_code", ""), *_lines(where, fields, "test_imports", [])]
    body = _body(f"{where}: test_list", "\n".join(lines))
    defined = {node.name for node in _body(f"{where}: code", code) if isinstance(node, ast.FunctionDef)}
    called = [
        n.func.id for item in body for n in ast.walk(item) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    ]
    entry_points = [name for name in called if name in defined]
    if not entry_points:
        raise UserError(
            f"{where}: test_list calls none of the functions that code defines ({', '.join(sorted(defined))})"
        )
    check = ast.parse("def check(candidate): pass").body[0]
    assert isinstance(check, ast.FunctionDef)
    check.body = body
    try:
        tests = ast.unparse(check)
    except RecursionError:
        raise UserError(f"{where}: test_list: {TOO_DEEP}") from None
    name = f"MBPP/{fields.get('task_id', where)}"
    return Problem(name, text, "", "\n".join(filter(None, setup)), entry_points[0], tests, code)


def _plain(where: str, fields: dict[str, Any]) -> Problem:
    for field in ("entry_point", "tests"):
        if field not in fields:
            raise UserError(f"{where} has no {field}; it has {', '.join(fields) or 'nothing'}")
    prompt = _text(where, fields, "prompt", "")
    solution = _text(where, fields, "solution" if "solution" in fields else "code", "")
    limits = {field: fields[field] for field in ("timeout", "memory_mb") if field in fields}
    for field, value in limits.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{where}: {field} is {value!r}; it must be a number above 0")
    entry_point = _text(where, fields, "entry_point")
    begun = re.search(rf"^(async )?def {re.escape(entry_point)}\b", prompt, re.MULTILINE)
    return Problem(
        name=str(fields.get("name", fields.get("task_id", where))),
        text=prompt,
        prefix=prompt if begun else "",
        suffix="",
        entry_point=entry_point,
        tests=fields["tests"],
        solution=solution,
        **limits,
    )


def _text(where: str, fields: dict[str, Any], name: str, otherwise: str | None = None) -> str:
    value = fields.get(name, otherwise)
    if not isinstance(value, str):
        raise UserError(
            f"{where}: {name} is {'missing' if value is None else type(value).__name__}; it must be a string"
        )
    return value


def _lines(where: str, fields: dict[str, Any], name: str, otherwise: list[str] | None = None) -> list[str]:
    value = fields.get(name, otherwise)
    if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
        raise UserError(f"{where}: {name} must be a list of strings")
    return value
