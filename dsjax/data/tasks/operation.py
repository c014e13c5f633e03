"""What tasks are made of: operations with words and code, steps that fix their parameters, and how steps are run.

Tables of operations are text, read by :func:`operations`:

    keep_multiples: ints -> ints with k in 3, 4, 5
      - keep only the multiples of $k                       sentences that say what it does
      - remove every number that is not divisible by $k
      = [v for v in $x if v % $k == 0]                      ways to write it in Python: an expression of $x,
      =                                                     or statements that assign $y
          $y = []
          for value in $x:
              if value % $k == 0:
                  $y.append(value)

Every operation is total: it has a result for every value of its type, and never changes its input. That the ways to
write one agree, and that no sentence belongs to two operations, is tested.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import random
import re
import string
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

Parameters = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Operation:
    """See the module. ``parameters``: name -> the values that it may have."""

    name: str
    takes: str
    gives: str
    phrases: tuple[str, ...]
    codes: tuple[str, ...]
    parameters: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def step(self, draw: random.Random) -> Step:
        """This operation with parameters drawn."""
        return Step(self, tuple((name, pick(draw, values)) for name, values in self.parameters))


@dataclasses.dataclass(frozen=True)
class Step:
    """An operation with its parameters fixed."""

    operation: Operation
    parameters: Parameters = ()

    @property
    def name(self) -> str:
        """Such as ``keep_multiples(3)``."""
        shown = ", ".join(repr(value) for _, value in self.parameters)
        return f"{self.operation.name}({shown})" if shown else self.operation.name

    def code(self, number: int, **names: str) -> str:
        """The operation's code of this number, names and parameters put in."""
        values = {name: repr(value) for name, value in self.parameters}
        return string.Template(self.operation.codes[number]).substitute(values | names)

    def phrase(self, number: int) -> str:
        """The sentence of this number."""
        return string.Template(self.operation.phrases[number]).substitute(
            {name: _shown(value) for name, value in self.parameters}
        )

    def is_expression(self, number: int) -> bool:
        """Whether the code of this number is an expression, not statements."""
        return "$y" not in self.operation.codes[number]


def _shown(value: Any) -> str:
    return ", ".join(map(repr, value)) if isinstance(value, tuple | list) else repr(value)


def operations(table: str) -> tuple[Operation, ...]:
    """The operations of a table, in the form that the module describes; they are separated by empty lines."""
    return tuple(map(_parsed, re.split(r"\n\n(?=\S)", table.strip("\n"))))


def _parsed(entry: str) -> Operation:
    head, *lines = entry.split("\n")
    name, takes, gives, given = _HEAD.fullmatch(head).groups()  # type: ignore[union-attr]
    phrases: list[str] = []
    codes: list[str] = []
    for line in lines:
        mark, rest = line[:4], line[4:]
        if mark == "  - ":
            phrases.append(rest)
        elif mark.rstrip() == "  =":
            codes.append(rest)
        elif codes:
            codes[-1] += f"\n{line}"
        else:
            phrases[-1] += f" {line.strip()}"
    parameters = [part.split(" in ", 1) for part in (given or "").split("; ") if part]
    values = tuple((key, ast.literal_eval(f"({listed},)")) for key, listed in parameters)
    return Operation(name, takes, gives, tuple(phrases), tuple(textwrap.dedent(c).strip("\n") for c in codes), values)


_HEAD = re.compile(r"(\w+): (\w+) -> (\w+)(?: with (.*))?")


def pick(draw: random.Random, items: Sequence[Any]) -> Any:
    """One of some items. Of Python's generators only `random()` is promised to stay as it is."""
    return items[min(int(draw.random() * len(items)), len(items) - 1)]


# ---------------------------------------------------------------- running

ARGUMENTS: Mapping[str, tuple[str, ...]] = {  # type -> names of the arguments of a function that takes it
    "ints": ("values",),
    "int": ("number",),
    "str": ("text",),
    "words": ("words",),
    "counts": ("counts",),
    "matrix": ("rows",),
    "nested": ("tree",),
    "commands": ("commands",),
    "pair": ("left", "right"),
}
MOST_NUMBER, MOST_ITEMS, MOST_CHARS = 10**9, 64, 240


class TooLarge(Exception):
    """A value on the way grew beyond what a task should show."""


@functools.lru_cache(maxsize=16384)
def compiled(step: Step, number: int = 0) -> Callable[..., Any]:
    """A function of the step's input, made of its code of this number. The code is this package's own."""
    names = ARGUMENTS[step.operation.takes]
    places = {"x": names[0]} | ({"z": names[1]} if len(names) > 1 else {})
    code = step.code(number, y="result", **places)
    body = f"return {code}" if step.is_expression(number) else f"{code}\nreturn result"
    scope: dict[str, Any] = {}
    exec(f"def step({', '.join(names)}):\n{textwrap.indent(body, '    ')}\n", scope)
    return scope["step"]


def outcomes(steps: Sequence[Step], inputs: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """What steps, one after another, make of each of the inputs (arguments as a tuple).

    Raises:
        TooLarge: a value on the way is; there is no outcome behind it.
    """
    first, *others = map(compiled, steps)
    for arguments in inputs:
        value, rest = first(*arguments), iter(others)
        while True:
            waiting = [value]
            while waiting:
                item = waiting.pop()
                if isinstance(item, int):
                    if not -MOST_NUMBER <= item <= MOST_NUMBER:
                        raise TooLarge
                elif len(item) > (MOST_CHARS if isinstance(item, str) else MOST_ITEMS):
                    raise TooLarge
                elif not isinstance(item, str):
                    waiting += item.values() if isinstance(item, dict) else item
            if (function := next(rest, None)) is None:
                break
            value = function(value)
        yield value
