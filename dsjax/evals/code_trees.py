"""Python programs as trees of tree-sitter, whole or broken: tokens, and the shapes of subtrees."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

from dsjax.config import UserError

Node = Any  # tree_sitter.Node


@functools.cache
def _parser() -> Any:
    try:
        import tree_sitter
        import tree_sitter_python
    except ImportError:
        raise UserError(
            'this needs the packages tree-sitter and tree-sitter-python; install the extra: pip install "dsjax[code]"'
        ) from None
    return tree_sitter.Parser(tree_sitter.Language(tree_sitter_python.language()))


def parse(code: str) -> Node:
    """The root of a program's tree; errors are nodes of it. Half surrogate pairs become question marks."""
    return _parser().parse(code.encode("utf-8", errors="replace")).root_node


def children(node: Node) -> list[Node]:
    """The children that are code: no comments, no docstrings."""
    return [c for c in node.children if c.type != "comment" and not _is_docstring(c)]


def _is_docstring(node: Node) -> bool:
    """A statement that is nothing but a string, first in its block."""
    if node.type != "expression_statement" or node.named_child_count != 1 or node.named_children[0].type != "string":
        return False
    before = node.prev_named_sibling
    while before is not None and before.type == "comment":
        before = before.prev_named_sibling
    return before is None and node.parent is not None and node.parent.type in ("module", "block")


def tokens(root: Node) -> list[str]:
    """The leaves from left to right; a string is one token."""
    found: list[str] = []
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node.child_count and node.type != "string":
            waiting += reversed(children(node))
        elif node.text:
            found.append(node.text.decode("utf-8", errors="replace"))
    return found


def shapes(root: Node, known: dict[tuple[Any, ...], int]) -> Counter[int]:
    """How often each subtree with an inner node at its top occurs: kinds of named nodes, without names and values.

    Args:
        known: numbers of shapes, shared by all trees that are compared; new ones are added.
    """
    counts: Counter[int] = Counter()
    number: dict[int, int] = {}
    for node in _bottom_up(root):
        inner = [c for c in children(node) if c.is_named]
        key = (node.type, *(number[c.id] for c in inner))
        number[node.id] = known.setdefault(key, len(known))
        if inner:
            counts[number[node.id]] += 1
    return counts


def _bottom_up(root: Node) -> Iterator[Node]:
    """Named nodes, each behind those below it; without recursion, since a hostile program is nested deeply."""
    order, waiting = [], [root]
    while waiting:
        node = waiting.pop()
        order.append(node)
        waiting += [c for c in children(node) if c.is_named]
    return reversed(order)
