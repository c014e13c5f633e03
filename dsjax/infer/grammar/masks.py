"""Which tokens of a vocabulary may follow a text: a bit for each, found once for each kind of place.

What a token does to the lexer is known from the state of the lexer alone, so the vocabulary is sorted once for each
state by the events that tokens give (:class:`dsjax.infer.grammar.vocabulary.Tree`). What the stacks say to those is
found by walking that tree, and remembered with as many levels of the stack as the answer took: other stacks with the
same top have the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import no_type_check

import numpy as np

from dsjax.infer.grammar.lexer import Inside, Lex, between
from dsjax.infer.grammar.lr import Node
from dsjax.infer.grammar.reader import MOST_BRACKETS, MOST_DEEP, MOST_INDENTS, Place, Reader
from dsjax.infer.grammar.vocabulary import Branch, Tree, branch_of, outcomes, tree_of

SMALL = 6  # a tree of so few edges and ends is walked faster than looked up
MOST_NODES, MOST_PLACES = 300_000, 100_000  # remembered: about 100 MB


@no_type_check  # tests would check each call, and take ten times as long
class Masks:
    """The tokens of a vocabulary that may follow a text.

    Args:
        texts: the bytes of each token; empty: of none that is text.
        reader: of the language.
    """

    def __init__(self, texts: Sequence[bytes], reader: Reader):
        self.texts, self.reader = list(texts), reader
        self._root = branch_of(texts)
        self._trees: dict[Branch, dict[Lex, Tree]] = {}
        self._shared: dict[object, Tree] = {}
        # How far a token can bring what is limited: nearer to a limit than that, the answer depends on how near.
        self._bytes, self._lines = max(map(len, self.texts)), max(text.count(b"\n") for text in self.texts)
        self._brackets = max(sum(text.count(c) for c in (b"(", b"[", b"{", b"'", b'"')) for text in self.texts)
        self.walks = self.asked = 0

    # ------------------------------------------------------------ places

    def after(self, place: Place, token: int) -> Place | None:
        """Where a text is with one more token; None: it may not follow."""
        try:
            return place.next[token]
        except KeyError:
            text = self.texts[token]
            found = place.next[token] = self.reader.read(place, text) if text else None
            return found

    def row(self, place: Place) -> np.ndarray:
        """The tokens that may follow, a bit each, the first one the lowest: (ceil(V / 8),) uint8."""
        self.asked += 1
        if place.row is None:
            self.walks += 1
            tree, bits = self.tree(self._root, place.lex), 0
            for node in place.nodes:
                bits |= self._allowed(tree, node, place.around, place.indents, place.blanks)[0]
            place.row = np.frombuffer(bits.to_bytes(-(-len(self.texts) // 8), "little"), np.uint8)
        return place.row  # type: ignore[return-value]

    def tree(self, branch: Branch, state: Lex) -> Tree:
        """What comes of the tokens of a branch from a state of the lexer."""
        trees = self._trees.setdefault(branch, {})
        found = trees.get(state)
        if found is None:
            found = trees[state] = tree_of(outcomes(branch, state), self._shared)
        return found

    def make_room(self) -> None:
        """Forgets what was remembered, if it is too much. Places that somebody holds stay right."""
        if self.reader.automaton.num_nodes > MOST_NODES or self.reader.num_places > MOST_PLACES:
            self.reader.forget()
            for tree in self._shared.values():
                tree.known.clear()

    # ------------------------------------------------------------ one stack

    def _allowed(
        self, tree: Tree, node: Node, around: tuple[Inside, ...], indents: tuple[str, ...], blanks: str
    ) -> tuple[int, int]:
        """The tokens that may follow a stack, as bits, and the lowest depth that this depends on."""
        bits, lowest = self._remembered(tree, node, around, indents, blanks)
        if tree.closing_ends:
            more, depth = self._ended(tree.closing_ends, node, indents)
            bits, lowest = bits | more, min(lowest, depth)
        for edge, child in tree.closing:
            more, depth = self._behind(edge, child, node, around, indents, blanks)
            bits, lowest = bits | more, min(lowest, depth)
        return bits, lowest

    def _remembered(
        self, tree: Tree, node: Node, around: tuple[Inside, ...], indents: tuple[str, ...], blanks: str
    ) -> tuple[int, int]:
        """The same without what closes, from what was found for stacks with the same top."""
        if tree.size <= SMALL:
            return self._walked(tree, node, around, indents, blanks)
        near = (
            max(0, node.depth + self._bytes - MOST_DEEP),
            max(0, len(around) + self._brackets - MOST_BRACKETS),
            max(0, len(indents) + self._lines - MOST_INDENTS),
        )
        beside = (near, around if tree.pops else None, (indents, blanks) if tree.lines else None)
        for levels, known in tree.known.items():
            lowest = node.depth + 1 - levels
            if lowest >= 0:
                found = known.get((node.states(lowest), beside))
                if found is not None:
                    return found, lowest
        bits, lowest = self._walked(tree, node, around, indents, blanks)
        tree.known.setdefault(node.depth + 1 - lowest, {})[node.states(lowest), beside] = bits
        return bits, lowest

    def _walked(
        self, tree: Tree, node: Node, around: tuple[Inside, ...], indents: tuple[str, ...], blanks: str
    ) -> tuple[int, int]:
        bits, lowest = self._ended(tree.ends, node, indents)
        for edge, child in tree.edges:
            more, depth = self._behind(edge, child, node, around, indents, blanks)
            bits, lowest = bits | more, min(lowest, depth)
        for branch in tree.rests:
            more, depth = self._allowed(self.tree(branch, between(around[-1])), node, around[:-1], indents, blanks)
            bits, lowest = bits | more, min(lowest, depth)
        return bits, lowest

    def _ended(
        self, ends: Sequence[tuple[tuple[tuple[str, ...], ...], int]], node: Node, indents: tuple[str, ...]
    ) -> tuple[int, int]:
        """The tokens behind which something is begun that may become what the stack takes."""
        bits, lowest = 0, node.depth
        for ways, ids in ends:
            for tokens in ways:
                fits, depth = self.reader.takes(node, tokens, indents)
                lowest = min(lowest, depth)
                if fits:
                    bits |= ids
                    break
        return bits, lowest

    def _behind(
        self,
        edge: str | Inside | tuple[bool, str],
        child: Tree,
        node: Node,
        around: tuple[Inside, ...],
        indents: tuple[str, ...],
        blanks: str,
    ) -> tuple[int, int]:
        """The tokens that begin with one more event."""
        nodes: tuple[Node, ...] = (node,)
        bits, lowest = 0, node.depth
        if isinstance(edge, str):
            nodes, lowest = self.reader.shift(node, edge, indents)
        elif isinstance(edge, Inside):
            nodes, around = nodes if len(around) < MOST_BRACKETS else (), (*around, edge)
        else:
            anew, text = edge
            nodes, indents, lowest = self.reader.line(node, indents, text if anew else blanks + text)
            blanks = ""
        for other in nodes:
            more, depth = self._allowed(child, other, around, indents, blanks)
            bits, lowest = bits | more, min(lowest, depth)
        return bits, lowest
