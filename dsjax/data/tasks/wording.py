"""A task in English and in Python: specification, signature and docstring, the reference solution in some style."""

from __future__ import annotations

import ast
import random
import textwrap
from collections.abc import Sequence

from dsjax.data.tasks.operation import ARGUMENTS, Step, pick
from dsjax.data.tasks.values import KINDS, RESULTS

NAMES = ("solve", "transform", "compute", "process", "evaluate", "work_out", "task", "answer")
_WIDTH = 96
_LOCALS = {
    "ints": "numbers",
    "int": "total",
    "str": "chars",
    "words": "parts",
    "counts": "table",
    "matrix": "grid",
    "nested": "nodes",
}


def specification(steps: Sequence[Step], draw: random.Random) -> str:
    """What a function is to do; one of several wordings of each step and of the whole."""
    noun = pick(draw, KINDS[steps[0].operation.takes].nouns)
    said = [step.phrase(int(draw.random() * len(step.operation.phrases))) for step in steps]
    if len(said) == 1:
        return pick(
            draw,
            (
                f"Given {noun}, {said[0]}. Return the result.",
                f"Take {noun} and return what you get when you do this: {said[0]}.",
            ),
        )
    first, *rest = said
    numbered = " ".join(f"({i}) {s}{';' if i < len(said) else '.'}" for i, s in enumerate(said, 1))
    wordings = (
        f"Given {noun}, {first}, then {', then '.join(rest)}. Return the result.",
        f"Start with {noun}. First, {first}. "
        + " ".join(f"Then, {s}." for s in rest)
        + " Return what you have in the end.",
        f"Return what becomes of {noun} after these steps: {numbered}",
        f"Take {noun} and do the following, one after another: {'; '.join(said)}. Return the last result.",
    )
    return pick(draw, wordings)


def signature(steps: Sequence[Step], name: str) -> str:
    """The ``def`` line."""
    kind = KINDS[steps[0].operation.takes]
    given = zip(ARGUMENTS[steps[0].operation.takes], kind.annotations, strict=True)
    arguments = ", ".join(f"{argument}: {annotation}" for argument, annotation in given)
    return f"def {name}({arguments}) -> {RESULTS[steps[-1].operation.gives]}:"


def docstring(text: str, examples: Sequence[str]) -> str:
    """A docstring with its examples if there are any, indented, as it stands below the signature."""
    lines = textwrap.wrap(text, _WIDTH - 4, break_long_words=False, break_on_hyphens=False)
    body = "\n".join([*lines, "", *examples] if examples else lines)
    return textwrap.indent(f'"""{body}\n"""', "    ").replace("\n    \n", "\n\n") + "\n"


def solution(steps: Sequence[Step], draw: random.Random) -> str:
    """The body of a function that does the steps, indented; one of several styles."""
    numbers = [int(draw.random() * len(step.operation.codes)) for step in steps]
    style = pick(draw, ("steps", "steps", "names", "nested"))
    arguments = ARGUMENTS[steps[0].operation.takes]
    if style == "nested":
        if nested := _nested(steps, arguments):
            return f"    return {nested}\n"
        style = "steps"
    lines, current = [], {"x": arguments[0]} | ({"z": arguments[1]} if len(arguments) > 1 else {})
    for place, (step, number) in enumerate(zip(steps, numbers, strict=True)):
        is_last = place == len(steps) - 1
        if style == "names":
            target = "result" if is_last else f"step_{place + 1}"
        else:
            kinds = step.operation.takes, step.operation.gives
            target = current["x"] if kinds[0] == kinds[1] and step.is_expression(number) else _LOCALS[kinds[1]]
            if target == current["x"] and not step.is_expression(number):
                target = f"new_{target}" if not target.startswith("new_") else target.removeprefix("new_")
        if step.is_expression(number):
            code = step.code(number, **current)
            lines.append(f"return {code}" if is_last else f"{target} = {code}")
        else:
            lines.append(step.code(number, y=target, **current))
            if is_last:
                lines.append(f"return {target}")
        current = {"x": target}
    return textwrap.indent("\n".join(lines), "    ") + "\n"


def _nested(steps: Sequence[Step], arguments: tuple[str, ...]) -> str:
    """One expression, if every step is one that names its input once; else an empty text."""
    names = {"x": arguments[0]} | ({"z": arguments[1]} if len(arguments) > 1 else {})
    for place, step in enumerate(steps):
        if not step.is_expression(0) or (place and step.operation.codes[0].count("$x") != 1):
            return ""
        names = {"x": _bracketed(step.code(0, **names))}
    inner = names["x"]
    return inner[1:-1] if inner.startswith("(") and _is_whole(inner) else inner


def _bracketed(code: str) -> str:
    """The expression, in brackets unless it is one thing."""
    node = ast.parse(code, mode="eval").body
    return code if isinstance(node, ast.Call | ast.Name | ast.Subscript | ast.ListComp | ast.DictComp) else f"({code})"


def _is_whole(code: str) -> bool:
    try:
        ast.parse(code[1:-1], mode="eval")
    except SyntaxError:
        return False
    return True
