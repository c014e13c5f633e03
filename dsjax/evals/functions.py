"""Function bodies: cut from held-out Python files, sampled by a model, counted when they parse."""

from __future__ import annotations

import ast
import dataclasses
import textwrap
from collections.abc import Sequence

import numpy as np

from dsjax.data.build.syntax import lines_of, parsed
from dsjax.data.prepare import HeldOut


@dataclasses.dataclass(frozen=True)
class FunctionPrompt:
    """A place where a function's body is to be written.

    Attributes:
        name: file and function.
        context: the file up to and including the function's signature and docstring.
        head: signature and docstring alone.
        indent: columns that ``def`` is indented by.
        body: what the file has there.
    """

    name: str
    context: str
    head: str
    indent: int
    body: str


def function_prompts(documents: Sequence[HeldOut], limit: int, seed: int = 0) -> list[FunctionPrompt]:
    """Up to ``limit`` functions of held-out Python files, in a seeded random order; one-line bodies are left out."""
    found: list[FunctionPrompt] = []
    for document in documents:
        tree = _parse(document.text)
        if tree is None:
            continue
        lines = lines_of(document.text)
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            begins = node.body[1] if documented and len(node.body) > 1 else first
            if _shares_its_line(begins, lines) or (documented and len(node.body) == 1):
                continue
            decorators = getattr(begins, "decorator_list", [])
            start, body = node.lineno - 1, min(n.lineno for n in (begins, *decorators)) - 1
            found.append(
                FunctionPrompt(
                    name=f"{document.name}:{node.name}",
                    context="".join(lines[:body]),
                    head="".join(lines[start:body]),
                    indent=node.col_offset,
                    body="".join(lines[body : node.end_lineno]),
                )
            )
    order = np.random.default_rng(seed).permutation(len(found))[:limit]
    return [found[i] for i in order]


def _shares_its_line(node: ast.stmt, lines: Sequence[str]) -> bool:
    """Whether a signature, or another statement, ends in front of it."""
    return bool(lines[node.lineno - 1].encode()[: node.col_offset].strip())


def parses(prompt: FunctionPrompt, body: str) -> bool:
    """Whether signature and body together are a valid function with at least one statement in the body."""
    tree = _parse(textwrap.dedent(" " * prompt.indent + prompt.head.lstrip() + body))
    if tree is None or len(tree.body) != 1 or not isinstance(tree.body[0], (ast.FunctionDef, ast.AsyncFunctionDef)):
        return False
    return bool(body.strip())


def _parse(text: str) -> ast.Module | None:
    tree = parsed(text)
    return None if isinstance(tree, str) else tree


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z, p = 1.959964, successes / n
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
