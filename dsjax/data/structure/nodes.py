"""The nodes that are open at a place in the text: blocks of statements, and the brackets in the last one."""

from __future__ import annotations

from dsjax.data.structure.lexer import Place
from dsjax.nn.fields import DEFINITIONS, KIND

# Columns of blocks that have no line of their own.
WAITING, INLINE = 2**30, -1  # behind a header, before its first statement; behind a header, in its line
_CLOSERS = {b"(": b")", b"[": b"]", b"{": b"}"}
_OWN_NAMES = frozenset(("module", "class", "def", "async_def"))


class Node:
    """One of them.

    Attributes:
        kind: of :data:`dsjax.nn.fields.KINDS`; its number is ``number``.
        at: the token that the statement of a block begins in, or that a bracket stands in; -1: there is none.
        column: by which the statements of a block are indented; None: this is no block.
        closer: the bracket that ends this one.
        block: number of the innermost block in the stack, itself counted.
        depth: blocks in the stack up to here, beside the outermost.
        brackets: brackets up to here since the innermost block.
        definition: see :data:`dsjax.nn.fields.CATEGORIES`.
        siblings: statements of a block so far.
        items: commas so far, of a block those of the statement.
        previous: number of the kind of the last whole statement of a block.
        names: the tokens in which names were bound last, of a block that has its own.
        back: where the text of a string goes on behind a field.
    """

    __slots__ = ("at", "back", "block", "brackets", "closer", "column", "definition", "depth", "items", "kind", "names",
                 "number", "previous", "siblings")  # fmt: skip

    def __init__(self, kind: str, at: int, column: int | None = None, closer: bytes = b"", back: Place | None = None):
        self.kind, self.at, self.column, self.closer, self.back = kind, at, column, closer, back
        self.number, self.siblings, self.items, self.previous = KIND[kind], 0, 0, 0
        self.names: dict[bytes, int] | None = {} if kind in _OWN_NAMES else None
        self.block = self.depth = self.brackets = self.definition = 0

    @classmethod
    def bracket(cls, kind: str, at: int, opener: bytes) -> Node:
        return cls(kind, at, closer=_CLOSERS[opener])

    def placed(self, stack: list[Node], loops: frozenset[str]) -> Node:
        """Itself, as the next node of a stack."""
        below = stack[-1]
        if self.column is None:
            self.block, self.depth, self.brackets = below.block, below.depth, below.brackets + 1
            self.definition = below.definition
            return self
        self.block, self.depth = len(stack), below.depth + 1
        if self.kind in DEFINITIONS:
            self.definition = DEFINITIONS.index(self.kind)
        else:
            inherited = below.definition
            self.definition = inherited % len(DEFINITIONS) + len(DEFINITIONS) if self.kind in loops else inherited
        return self

    def copy(self) -> Node:
        other = Node.__new__(Node)
        for name in Node.__slots__:
            setattr(other, name, getattr(self, name))
        other.names = None if self.names is None else dict(self.names)
        return other
