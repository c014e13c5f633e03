"""Small syntax errors put into Python code, each with the line that mends it."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import keyword
import math
import random
import tokenize
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

from dsjax.config import Bounds, PositiveInt, UserError
from dsjax.data.build.syntax import lines_of

BROKEN, REPAIR = "<|broken|>", "<|repair|>"


@dataclasses.dataclass(frozen=True)
class RepairConfig:
    """Rows that hold broken code and the line that mends it, beside the rows of the corpus.

    Attributes:
        share: of the rows.
        per_document: broken functions of each training document, at most.
        max_lines: of such a function.
    """

    share: Annotated[float, Bounds(gt=0, lt=1)] = 0.1
    per_document: PositiveInt = 4
    max_lines: PositiveInt = 30


@dataclasses.dataclass(frozen=True)
class Broken:
    """A text with an error.

    Attributes:
        kind: of :data:`SHARES`.
        text: broken.
        line: number of the line that was changed, from 0.
        original: that line as it was, with its end.
    """

    kind: str
    text: str
    line: int
    original: str

    def mended(self, line: str) -> str:
        """The text with another line in the place of the changed one."""
        lines = lines_of(self.text)
        return "".join([*lines[: self.line], line, *lines[self.line + 1 :]])


def functions(text: str, max_lines: int) -> list[str]:
    """The functions of a Python file that are not longer, each moved to the first column; none if it does not parse."""
    tree, lines, found = parsed(text), lines_of(text), []
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
            own = lines[node.lineno - 1 : node.end_lineno]
            indent = node.col_offset
            moved = [line[indent:] if not line[:indent].strip() else line for line in own]
            code = "".join(moved)
            if 2 <= len(own) <= max_lines and code.endswith("\n") and parsed(code) is not None:
                found.append(code)
    return found


def parsed(text: str) -> ast.Module | None:
    """The tree of a text; None: it has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def broken(text: str, rng: random.Random, shares: Mapping[str, float] | None = None, tries: int = 20) -> Broken | None:
    """A text that parses with one error, of a kind drawn by ``shares``, that makes it not parse; None: none was found.

    Raises:
        UserError: a kind that there is not, or shares of which none is above 0.
    """
    shares = SHARES if shares is None else shares
    if unknown := set(shares) - set(_BREAK):
        raise UserError(f"there is no kind of error {min(unknown)!r}; there are {', '.join(_BREAK)}")
    if min(shares.values(), default=0.0) < 0 or not 0 < sum(shares.values()) < math.inf:
        raise UserError(f"the shares of errors are {dict(shares)}; they must be numbers from 0, at least one above it")
    lines = lines_of(text)
    try:
        tokens = list(tokenize.generate_tokens(iter(lines).__next__))
    except (tokenize.TokenError, SyntaxError):
        return None
    for _ in range(tries):
        kind = rng.choices(list(shares), weights=list(shares.values()))[0]
        change = _BREAK[kind](tokens, lines, rng)
        if change is None:
            continue
        number, line = change
        result = Broken(kind, "".join([*lines[:number], line, *lines[number + 1 :]]), number, lines[number])
        if line != lines[number] and len(lines_of(line)) == 1 and parsed(result.text) is None:
            return result
    return None


# ---------------------------------------------------------------- kinds

# (tokens, lines, rng) -> (number of the line, the line with an error), or None: there is no place for one.
_Tokens = Sequence[tokenize.TokenInfo]
_Change = Callable[[_Tokens, Sequence[str], random.Random], "tuple[int, str] | None"]


def _with(lines: Sequence[str], token: tokenize.TokenInfo, text: str) -> tuple[int, str]:
    """The line of a token with another text in its place."""
    number, line = token.start[0] - 1, lines[token.start[0] - 1]
    return number, line[: token.start[1]] + text + line[token.end[1] :]


def _one(tokens: _Tokens, rng: random.Random, fits: Callable[[tokenize.TokenInfo], bool]) -> tokenize.TokenInfo | None:
    found = [token for token in tokens if token.start[0] == token.end[0] and fits(token)]
    return rng.choice(found) if found else None


def _dropped(fits: Callable[[tokenize.TokenInfo], bool]) -> _Change:
    def change(tokens: _Tokens, lines: Sequence[str], rng: random.Random) -> tuple[int, str] | None:
        token = _one(tokens, rng, fits)
        return None if token is None else _with(lines, token, "")

    return change


def _is_sign(*signs: str) -> Callable[[tokenize.TokenInfo], bool]:
    return lambda token: token.type == tokenize.OP and token.string in signs


def _ends_a_header(token: tokenize.TokenInfo) -> bool:
    return _is_sign(":")(token) and token.line[token.end[1] :].split("#")[0].strip() == ""


def _other_bracket(tokens: _Tokens, lines: Sequence[str], rng: random.Random) -> tuple[int, str] | None:
    token = _one(tokens, rng, _is_sign(*")]}"))
    return None if token is None else _with(lines, token, rng.choice(")]}".replace(token.string, "")))


def _open_string(tokens: _Tokens, lines: Sequence[str], rng: random.Random) -> tuple[int, str] | None:
    token = _one(tokens, rng, lambda t: t.type == tokenize.STRING and t.string[-3:] not in ('"""', "'''"))
    return None if token is None else _with(lines, token, token.string[:-1])


def _other_indentation(tokens: _Tokens, lines: Sequence[str], rng: random.Random) -> tuple[int, str] | None:
    if len(lines) < 2:
        return None
    number = rng.randrange(1, len(lines))
    line = lines[number]
    indent = len(line) - len(line.lstrip(" "))
    if not line.strip():
        return None
    return number, " " * max(indent + rng.choice((-4, -2, -1, 1, 2, 4)), 0) + line.lstrip(" ")


def _misspelt(tokens: _Tokens, lines: Sequence[str], rng: random.Random) -> tuple[int, str] | None:
    token = _one(tokens, rng, lambda t: t.type == tokenize.NAME and keyword.iskeyword(t.string))
    if token is None:
        return None
    word, at = token.string, rng.randrange(len(token.string) - 1)
    twice, left_out = word[: at + 1] + word[at:], word[:at] + word[at + 1 :]
    swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return _with(lines, token, rng.choice((twice, left_out, swapped)))


def _swapped(tokens: _Tokens, lines: Sequence[str], rng: random.Random) -> tuple[int, str] | None:
    kinds = (tokenize.NAME, tokenize.OP, tokenize.NUMBER)
    pairs = [
        (a, b) for a, b in itertools.pairwise(tokens) if a.type in kinds and b.type in kinds and a.start[0] == b.end[0]
    ]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    number, line = a.start[0] - 1, lines[a.start[0] - 1]
    between = line[a.end[1] : b.start[1]]
    return number, line[: a.start[1]] + b.string + between + a.string + line[b.end[1] :]


def _assigned(tokens: _Tokens, lines: Sequence[str], rng: random.Random) -> tuple[int, str] | None:
    token = _one(tokens, rng, _is_sign("=="))
    return None if token is None else _with(lines, token, "=")


_BREAK: dict[str, _Change] = {
    "bracket dropped": _dropped(_is_sign(*"()[]{}")),
    "bracket changed": _other_bracket,
    "colon dropped": _dropped(_ends_a_header),
    "sign dropped": _dropped(_is_sign(",", ".", "=", "+", "-", "*", "/", "%", "==", "<", ">", "!=", "->")),
    "quote dropped": _open_string,
    "indentation": _other_indentation,
    "keyword misspelt": _misspelt,
    "tokens swapped": _swapped,
    "assigned": _assigned,
}
# How often a small model itself gets them wrong: of 357 errors in 400 bodies of functions that configs/coder/plain.py
# wrote after 200 steps (benchmarks/sample_errors.py). Python tells strings (31 %), indentation (31 %), brackets (17 %),
# assignments and colons from the rest (19 %); what it does not tell apart is shared out equally.
SHARES: dict[str, float] = {
    "indentation": 0.314,
    "quote dropped": 0.308,
    "bracket dropped": 0.083,
    "bracket changed": 0.083,
    "sign dropped": 0.063,
    "keyword misspelt": 0.063,
    "tokens swapped": 0.063,
    "assigned": 0.017,
    "colon dropped": 0.006,
}
