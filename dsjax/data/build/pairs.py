"""Pairs of what is asked and what is written: a function's signature and docstring, and its body.

From every Python function with a docstring of some words and a body that does something. A method is cut out of its
class and moved to the left. Both halves together are the function of the file: syntax trees are compared.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator

from dsjax.data.build.syntax import parsed

MIN_WORDS = 3  # of a docstring
MAX_CHARS = 8192  # of a pair
_MANY_LINES = re.compile(r"\"\"\"|'''|\\\n")  # what a string of several lines has in it


@dataclasses.dataclass(frozen=True)
class Pair:
    """``head + body`` is a function that parses: signature and docstring; the rest. ``name`` is qualified."""

    name: str
    head: str
    body: str


def pairs_of(text: str) -> Iterator[Pair]:
    """The pairs of a Python file, in order; none if it does not parse."""
    tree = parsed(text)
    if isinstance(tree, str) or "\r" in text or "\f" in text:  # lines are counted in another way there
        return
    lines = text.split("\n")
    scopes: list[tuple[ast.AST, str]] = [(tree, "")]
    while scopes:
        scope, prefix = scopes.pop()
        inner: list[tuple[ast.AST, str]] = []
        for node in ast.iter_child_nodes(scope):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                if pair := _pair(node, f"{prefix}{node.name}", lines):
                    yield pair
            elif isinstance(node, ast.ClassDef):
                inner.append((node, f"{prefix}{node.name}."))
            elif isinstance(node, ast.stmt):  # functions under `if` and `try`
                inner.append((node, prefix))
        scopes += reversed(inner)


def _pair(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str, lines: list[str]) -> Pair | None:
    docstring = ast.get_docstring(node)
    if not docstring or len(docstring.split()) < MIN_WORDS or len(node.body) < 2 or _does_nothing(node.body[1:]):
        return None
    first, last = node.body[1], node.end_lineno or 0
    begin, split = node.lineno - 1, node.body[0].end_lineno or 0
    if min([first.lineno, *(d.lineno for d in getattr(first, "decorator_list", []))]) <= split:
        return None  # the body begins on the docstring's line
    indent = node.col_offset
    head, body = ("\n".join(_moved(lines[a:b], indent)) + "\n" for a, b in ((begin, split), (split, last)))
    if len(head) + len(body) > MAX_CHARS:
        return None
    # Moving lines changes strings of several lines, and lines that were not indented stay where they are.
    is_plain = not indent or not (_MANY_LINES.search(body) or any(map(_stays, lines[begin:last], [indent] * last)))
    return Pair(name, head, body) if is_plain or _same(node, head + body) else None


def _stays(line: str, indent: int) -> bool:
    return bool(line.strip()) and not line.startswith(" " * indent)


def _does_nothing(body: list[ast.stmt]) -> bool:
    """Stubs: pass, ``...`` and raise NotImplementedError."""

    def empty(node: ast.stmt) -> bool:
        if isinstance(node, ast.Raise):
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"
        return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))

    return all(map(empty, body))


def _moved(lines: list[str], indent: int) -> list[str]:
    margin = " " * indent
    return [line.removeprefix(margin) for line in lines]


def _docstring(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return (ast.get_docstring(node) or "").strip()


def _same(node: ast.FunctionDef | ast.AsyncFunctionDef, text: str) -> bool:
    """Whether a text is this function, but for decorators and white space in its docstring; no: nested too deep."""
    tree = parsed(text)
    other = None if isinstance(tree, str) else tree.body[0]
    if not isinstance(other, type(node)) or _docstring(other) != _docstring(node):
        return False
    try:
        sides = [(n.name, ast.dump(n.args), [ast.dump(s) for s in n.body[1:]]) for n in (node, other)]
    except RecursionError:
        return False
    return sides[0] == sides[1] and bool(text.strip())
