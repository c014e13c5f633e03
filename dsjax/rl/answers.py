"""Answers that are judged here and now: words, whole numbers, and expressions out of given numbers.

None of these functions raises, whatever the text is, and none of them runs anything of it.
"""

from __future__ import annotations

import collections
import fractions
import re
from collections.abc import Iterator, Sequence

MOST_CHARACTERS = 20  # of an expression, for each number in it
_WHOLE = re.compile(r"([-+]?)\$?(\d{1,18}|\d{1,3}(?:,\d{3}){1,5})", re.ASCII)
_END = re.compile(r"(?<=\S)\s*\bdollars?\.?$|(?<=[\w})\]])\.$", re.ASCII)
_UNBRACED = re.compile(r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?|\\[^$\n]*|[^$\n]", re.ASCII)
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|mathrm|mbox)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"(?=.*[^\W\d_]{2})(?:[^\W\d_]|[ .,'’])+")
_TOKEN = re.compile(r"\d+|[-+*/()]", re.ASCII)


def normalised(text: str) -> str:
    """A text without blanks at its ends, and with single ones inside."""
    return " ".join(text.split())


def whole_number(text: str) -> int | None:
    """The number that a text is, written as 1234, -1,234 or $1,234; None: it is none, or too long to be told here."""
    found = _WHOLE.fullmatch(text.strip())
    return None if found is None else int(found[1] + found[2].replace(",", ""))


def words(text: str) -> list[str] | None:
    r"""The words that a text is, as yes or \text{Yes}: in small letters; what commas part, in any order.

    None: it is something else. Single letters alone are variables.
    """
    plain = normalised(_TEXT.sub(r"\1", text).strip().strip("$"))
    return sorted(part.strip() for part in plain.casefold().split(",")) if _WORDS.fullmatch(plain) else None


def unmarked(text: str) -> str:
    """An answer in mathematics without the full stop, and the word dollars, that it ends with."""
    return _END.sub("", text)


def boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{...}`` of a text, or else ``\fbox{...}``, braces balanced.

    Without braces it is a number, what begins with a command up to the end of the formula or line, or a character.
    None: there is none, or it does not end.
    """
    name = next((name for name in ("\\boxed", "\\fbox") if name in text), None)
    if name is None:
        return None
    inside = text[text.rfind(name) + len(name) :]
    inside = inside[:100].lstrip() + inside[100:]
    if not inside.startswith("{"):
        found = _UNBRACED.match(inside)
        return None if found is None else unmarked(found[0].strip()) or None
    depth = 0
    for brace in re.finditer(r"\\?[{}]", inside):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)  # escaped ones stand for themselves
        if depth == 0:
            return inside[1 : brace.start()].strip() or None
    return None


# ---------------------------------------------------------------- expressions


class _Wrong(Exception):
    """It is no expression."""


def reaches(text: str, numbers: Sequence[int], target: int, operators: str, *, every: bool) -> bool:
    """Whether a text is an expression that makes ``target`` out of ``numbers``.

    Args:
        text: numbers, brackets and ``operators``, with their usual precedence; - may stand in front of a part.
        numbers: each may be used once; whole, not negative.
        target: to be reached, exactly.
        operators: some of + - * /; / is of fractions.
        every: whether each has to be used.
    """
    if len(text) > MOST_CHARACTERS * max(len(numbers), 1):
        return False
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != text.replace(" ", "") or not set(tokens) & set("+-*/") <= set(operators):
        return False
    # Digits are counted before they are numbers: 007 is none that was given.
    used, given = collections.Counter(t for t in tokens if t.isdigit()), collections.Counter(map(str, numbers))
    if not used <= given or (every and used != given):
        return False
    rest = iter([*tokens, ""])
    try:
        value, end = _sum(next(rest), rest)
    except (_Wrong, ZeroDivisionError, RecursionError):
        return False
    return end == "" and value == target


def _sum(token: str, rest: Iterator[str]) -> tuple[fractions.Fraction, str]:
    """sum = product (("+" | "-") product)*; what it is, and the token behind it."""
    value, token = _product(token, rest)
    while token in ("+", "-"):
        other, behind = _product(next(rest), rest)
        value, token = (value + other if token == "+" else value - other), behind
    return value, token


def _product(token: str, rest: Iterator[str]) -> tuple[fractions.Fraction, str]:
    """product = part (("*" | "/") part)*"""
    value, token = _part(token, rest)
    while token in ("*", "/"):
        other, behind = _part(next(rest), rest)
        value, token = (value * other if token == "*" else value / other), behind
    return value, token


def _part(token: str, rest: Iterator[str]) -> tuple[fractions.Fraction, str]:
    """part = number | "-" part | "(" sum ")" """
    if token.isdigit():
        return fractions.Fraction(int(token)), next(rest)
    if token == "-":
        value, token = _part(next(rest), rest)
        return -value, token
    if token != "(":
        raise _Wrong
    value, token = _sum(next(rest), rest)
    if token != ")":
        raise _Wrong
    return value, next(rest)
