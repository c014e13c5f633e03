"""The values that tasks are about: what each type is called, a battery that tells meanings apart, random values.

The battery of a type is fixed for ever. Two tasks on one type mean the same if they have the same results on all of it.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Mapping
from typing import Any

from dsjax.data.tasks.machines import COMMANDS, WITH_AMOUNT
from dsjax.data.tasks.operation import pick

Arguments = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A type of values.

    annotations: of the arguments, as code.
    nouns: what a specification calls the input.
    edges: arguments that solutions get wrong, the first of the battery.
    draw: further ones.
    """

    annotations: tuple[str, ...]
    nouns: tuple[str, ...]
    edges: tuple[Arguments, ...]
    draw: Callable[[random.Random], Arguments]


def _below(draw: random.Random, n: int) -> int:
    return int(draw.random() * n)


def draw_ints(draw: random.Random) -> list[int]:
    """A list of up to nine integers, often with repetitions."""
    reach = pick(draw, (3, 10, 10, 30))
    low = pick(draw, (-reach, -reach, 0))
    return [low + _below(draw, reach - low + 1) for _ in range(_below(draw, 10))]


_CHARS = "aaeeiotnslrbcxyzABETR01239  "
_WORDS = (
    "a",
    "tree",
    "Stone",
    "apple",
    "eel",
    "noon",
    "of",
    "RIVER",
    "lamp",
    "x",
    "level",
    "blue",
    "ant",
    "Otter",
    "sea",
    "sea",
)


def draw_word(draw: random.Random) -> str:
    """A word, or some characters."""
    if draw.random() < 0.7:
        return pick(draw, _WORDS)
    return "".join(pick(draw, _CHARS.strip()) for _ in range(1 + _below(draw, 6)))


def _number(draw: random.Random) -> str:
    return str(_below(draw, pick(draw, (10, 10, 100))))


def draw_text(draw: random.Random) -> str:
    """A text: words, characters, or something of a form that one of the readers knows, now and then damaged."""
    makers: tuple[Callable[[], str], ...] = (
        lambda: " ".join(draw_word(draw) for _ in range(_below(draw, 6))),
        lambda: "".join(pick(draw, _CHARS) for _ in range(_below(draw, 16))),
        lambda: pick(draw, (",", ";", "|", " ")).join(
            pick(draw, ("", "-", " ")) + _number(draw) for _ in range(1 + _below(draw, 6))
        ),
        lambda: pick(draw, (";", ",", " ")).join(
            f"{draw_word(draw)}={_number(draw)}" for _ in range(1 + _below(draw, 4))
        ),
        lambda: "".join(pick(draw, "abcxyz") + pick(draw, ("", "2", "3", "1", "0")) for _ in range(_below(draw, 7))),
        lambda: (
            _number(draw)
            + "".join(pick(draw, ("+", "-", "*", " + ", " * ", " - ")) + _number(draw) for _ in range(_below(draw, 5)))
        ),
        lambda: _number(draw) + "".join(pick(draw, ("+", "*")) + _number(draw) for _ in range(_below(draw, 4))),
        lambda: "".join(pick(draw, ("(", ")", "a")) for _ in range(_below(draw, 7))),
        lambda: pick(draw, ("()", "(())", "(a(b)c)", "((()))()", "x(y)")) * (1 + _below(draw, 2)),
        lambda: " ".join(pick(draw, (f'"{draw_word(draw)}"', draw_word(draw))) for _ in range(1 + _below(draw, 4))),
        lambda: "\n".join(
            " " * _below(draw, 5) + draw_word(draw) + pick(draw, ("", " # " + draw_word(draw)))
            for _ in range(1 + _below(draw, 3))
        ),
        lambda: " ".join(f"{_below(draw, 24)}:{_below(draw, 60):02d}" for _ in range(1 + _below(draw, 3))),
        lambda: " ".join(
            pick(draw, ("IV", "XII", "IX", "VIII", "XXVI", "V", "I", "word")) for _ in range(1 + _below(draw, 3))
        ),
    )
    text = pick(draw, makers)()
    if draw.random() < 0.1 and text:
        at = _below(draw, len(text))
        text = text[:at] + pick(draw, ',;= -+a#"') + text[at + 1 :]
    return text


def draw_nested(draw: random.Random, depth: int = 0) -> list[Any]:
    """A list of integers and of such lists, up to four deep."""
    items: list[Any] = []
    for _ in range(_below(draw, 5)):
        if depth < 3 and draw.random() < 0.4:
            items.append(draw_nested(draw, depth + 1))
        else:
            items.append(_below(draw, 19) - 6)
    return items


def draw_matrix(draw: random.Random) -> list[list[int]]:
    """Up to four rows of up to four cells, all rows of one length."""
    rows, columns = _below(draw, 5), 1 + _below(draw, 4)
    return [[_below(draw, 15) - 5 for _ in range(columns)] for _ in range(rows)]


def draw_commands(draw: random.Random) -> list[str]:
    """Up to twelve commands, of all machines."""
    names = [pick(draw, (*COMMANDS, "add", "push", "push", "jump")) for _ in range(_below(draw, 13))]
    return [f"{name} {_below(draw, 14) - 3}" if name in WITH_AMOUNT else name for name in names]


def _draw_counts(draw: random.Random) -> dict[str, int]:
    return {draw_word(draw): _below(draw, 14) for _ in range(_below(draw, 7))}


_EDGE_INTS: tuple[list[int], ...] = (
    [], [0], [1], [-1], [7], [2, 2], [3, -3], [1, 2, 3, 4, 5], [5, 4, 3, 2, 1], [-3, -1, -2], [0, 0, 0],
    [10, -10, 5, -5], [3, 1, 2, 3, 1], [12], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [4, 4, 4, 4, 5], [6, 12, 18, 21, 35],
)  # fmt: skip
_EDGE_TEXTS = (
    "", "a", " ", "A", "aa", "ab", "Hello World", "  two  spaces ", "aaabbbccd", "AEIOU aeiou", "racecar", "x1y22z333",
    "7", "1+", "1,2,3", "-5; 6 ;x;7", "10|-2||3", "a=1;b=2;a=3", "a=1,b=x,=4,c=", "k=5 m=7 k=1", "3+4-2", "12 - 5 + 1",
    "2*3+4*5", "(()())", "(()", "())(", "a3b2c", "3ab0c", 'say "yes" and "no"', 'one " quote', "x # y\n  z # w\n\n v",
    "#", "7:05 12:30 noon 1:5", "IV XII IX hello I", "a-b-c", "--4 -x 5-6",
)  # fmt: skip

KINDS: Mapping[str, Kind] = {
    "ints": Kind(
        ("list[int]",),
        ("a list of integers", "a list of whole numbers", "a list of numbers"),
        tuple((x,) for x in _EDGE_INTS),
        lambda draw: (draw_ints(draw),),
    ),
    "int": Kind(
        ("int",),
        ("an integer", "a whole number", "a number"),
        tuple((x,) for x in (0, 1, -1, 2, 5, 9, 10, -10, 12, 17, 36, 99, 100, -245, 360, 1000, 1234, 9876)),
        lambda draw: (pick(draw, (1, 1, 1, -1)) * _below(draw, pick(draw, (10, 100, 1000, 10000))),),
    ),
    "str": Kind(
        ("str",),
        ("a text", "a string"),
        tuple((x,) for x in _EDGE_TEXTS),
        lambda draw: (draw_text(draw),),
    ),
    "counts": Kind(
        ("dict[str, int]",),
        ("a dictionary from text to integers", "a dictionary with texts as keys and integers as values"),
        (({},), ({"a": 1},), ({"b": 2, "a": 2},), ({"Ant": 3, "ant": 4, "": 0},)),
        lambda draw: (_draw_counts(draw),),
    ),
    "matrix": Kind(
        ("list[list[int]]",),
        ("a matrix of integers as a list of rows of equal length", "a matrix of integers, given row by row"),
        (([],), ([[0]],), ([[1, 2], [3, 4]],), ([[5, -1, 2]],), ([[1], [2], [-3]],), ([[2, 2], [2, 2], [0, 0]],)),
        lambda draw: (draw_matrix(draw),),
    ),
    "nested": Kind(
        ("list",),
        ("a nested list, whose items are integers or such lists", "a list of integers and of lists of the same form"),
        (([],), ([1],), ([[]],), ([1, [2, [3, [4]]]],), ([[1, 2], [], [3]],), ([-2, [4, 4], 4, [[]]],)),
        lambda draw: (draw_nested(draw),),
    ),
    "commands": Kind(
        ("list[str]",),
        ("a list of commands, each a word, perhaps with a number behind it", "a list of commands"),
        (([],), (["jump"],), (["add 3"],), (["push 2", "push 5", "pop"],), (["pop", "swap", "join"],)),
        lambda draw: (draw_commands(draw),),
    ),
    "pair": Kind(
        ("list[int]", "list[int]"),
        ("two lists of integers, the first called left and the second right",),
        (([], []), ([1], []), ([], [2]), ([1, 2], [1, 2]), ([3, 1], [1, 3]), ([1, 2, 3], [1, 2])),
        lambda draw: (draw_ints(draw), draw_ints(draw)),
    ),
}  # fmt: skip

_BATTERY = {"str": 90, "commands": 60}  # texts and commands of many forms: each form must come often enough
_USUAL = 40


@functools.cache
def battery(kind: str) -> tuple[Arguments, ...]:
    """The battery of a type: its edges, and values drawn once and for all; no two are equal."""
    draw = random.Random(f"battery/{kind}")
    found = list(KINDS[kind].edges)
    while len(found) < len(KINDS[kind].edges) + _BATTERY.get(kind, _USUAL):
        arguments = KINDS[kind].draw(draw)
        if arguments not in found:
            found.append(arguments)
    return tuple(found)


RESULTS: Mapping[str, str] = {  # type of a result -> its annotation
    "ints": "list[int]", "int": "int", "str": "str", "words": "list[str]", "counts": "dict[str, int]",
    "matrix": "list[list[int]]", "nested": "list",
}  # fmt: skip
