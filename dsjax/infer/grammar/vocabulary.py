"""The tokens of a vocabulary as bytes, in a tree by their first bytes, and what an automaton makes of all of them."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

from dsjax.config import UserError
from dsjax.data.tokenizer import Tokenizer
from dsjax.infer.grammar.endings import pending
from dsjax.infer.grammar.lexer import LINE, POP, Blank, Event, Inside, Lex

CLOSING = (")", "]", "}", "FSTRING_END", "NEWLINE")
REMEMBERED = 8  # tokens: what becomes of fewer is found again as fast


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of each id; none for special ones, which are no text.

    Raises:
        UserError: the tokenizer makes text of tokens in a way that is not known here.
    """
    inner = json.loads(tokenizer.to_json())
    kinds = _kinds(inner.get("decoder") or {})
    added, special = {i: name for name, i in tokenizer.added_ids.items()}, set(tokenizer.special_ids.values())
    vocabulary = inner["model"]["vocab"]
    names = {i: name for name, i in vocabulary.items()} if isinstance(vocabulary, dict) else {
        i: entry[0] for i, entry in enumerate(vocabulary)}  # fmt: skip
    if "ByteLevel" in kinds:
        read = _byte_level
    elif "ByteFallback" in kinds:
        read = _byte_fallback
    else:
        raise UserError(
            "a grammar needs a tokenizer whose decoder is ByteLevel or ByteFallback; this one's is"
            f" {', '.join(kinds) or 'none'}"
        )
    found = [b""] * tokenizer.vocab_size
    for i in range(len(found)):
        if i not in special:
            found[i] = added[i].encode() if i in added else read(names[i]) if i in names else b""
    return found


def _kinds(decoder: dict) -> list[str]:
    return [kind for part in decoder.get("decoders", [decoder]) if (kind := part.get("type"))]


def _byte_level(name: str) -> bytes:
    return bytes(_byte_of_letter()[c] for c in name)


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """The letters that byte-level BPE writes bytes as: printable ones as themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _byte_fallback(name: str) -> bytes:
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes([int(name[3:5], 16)])
    return name.replace("\u2581", " ").encode()


class Branch:
    """The tokens that begin with some bytes: a range of all tokens in order."""

    def __init__(self, words: Sequence[tuple[bytes, int]], first: int, last: int, depth: int):
        self.words, self.first, self.last, self.depth = words, first, last, depth
        self._children: list[tuple[int, Branch]] | None = None
        self.outcomes: dict[Lex, dict[tuple[tuple[Event, ...], Lex | Branch], list[int]]] = {}

    def __len__(self) -> int:
        return self.last - self.first

    @property
    def ended(self) -> list[int]:
        """The ids of tokens that are these bytes and no more."""
        found = []
        for word, i in self.words[self.first : self.last]:
            if len(word) > self.depth:
                break
            found.append(i)
        return found

    @property
    def children(self) -> list[tuple[int, Branch]]:
        """By the next byte."""
        if self._children is None:
            at, depth, self._children = self.first + len(self.ended), self.depth, []
            while at < self.last:
                byte, begin = self.words[at][0][depth], at
                while at < self.last and self.words[at][0][depth] == byte:
                    at += 1
                self._children.append((byte, Branch(self.words, begin, at, depth + 1)))
        return self._children

    @functools.cached_property
    def begins_lines(self) -> bool:
        """Whether something but blanks stands in a line that one of the tokens begins."""
        rests = (word[self.depth :] for word, _ in self.words[self.first : self.last])
        return any(rest.partition(b"\n")[2].strip() for rest in rests)


def branch_of(texts: Sequence[bytes]) -> Branch:
    """All tokens that are not empty."""
    words = sorted((text, i) for i, text in enumerate(texts) if text)
    return Branch(words, 0, len(words), 0)


Outcomes = dict[tuple[tuple[Event, ...], "Lex | Branch"], list[int]]


def outcomes(branch: Branch, state: Lex) -> Outcomes:
    """What comes of the rest of a branch's tokens: events and the state behind them -> ids.

    Behind :data:`POP` the state is not known: there stands the branch of what is left, and no ids.
    """
    if state in branch.outcomes:
        return branch.outcomes[state]
    found: Outcomes = {}
    if ended := branch.ended:
        found[(), state] = list(ended)
    for byte, child in branch.children:
        moved = state.step(byte)
        if moved is None:
            continue
        events, target = moved
        if target is None:
            found[events, child] = []
            continue
        for (more, end), ids in outcomes(child, target).items():
            found.setdefault((events + more, end), []).extend(ids)
    if len(branch) >= REMEMBERED:
        branch.outcomes[state] = found
    return found


class Tree:
    """What comes of tokens from one state of the lexer, as a tree of events.

    Attributes:
        ends, closing_ends: what is begun behind tokens that end here (:func:`dsjax.infer.grammar.endings.pending`), and
            their ids as the bits of a number.
        edges: a token, a bracket that opens, or a line that begins (whether anew, and the blanks), and what comes then.
        closing: those of them that close something: what they depend on may lie deep in a stack.
        rests: what is left of tokens behind a bracket that closes.
        pops, lines: whether there are such below, but for what closes.
        size: how many edges and ends.
        known: levels of a stack that the answer depends on -> those -> the ids that may follow, as bits.
    """

    __slots__ = ("closing", "closing_ends", "edges", "ends", "known", "lines", "pops", "rests", "size")

    def __init__(self) -> None:
        self.ends: list[tuple[tuple[tuple[str, ...], ...], int]] = []
        self.edges: list[tuple[str | Inside | tuple[bool, str], Tree]] = []
        self.closing_ends: list[tuple[tuple[tuple[str, ...], ...], int]] = []
        self.closing: list[tuple[str | Inside | tuple[bool, str], Tree]] = []
        self.rests: list[Branch] = []
        self.known: dict[int, dict[object, int]] = {}
        self.pops = self.lines = False
        self.size = 0


def tree_of(found: Outcomes, known: dict[object, Tree]) -> Tree:
    """The outcomes by their events. Trees that are equal are one: what is found out for one state serves others."""
    root = Tree()
    below: dict[int, tuple[Tree, dict, dict]] = {id(root): (root, {}, {})}
    for (events, end), ids in found.items():
        at, anew, blanks = root, False, ""
        for event in events:
            if isinstance(event, Blank):
                anew, blanks = (True, "") if event.text is None else (anew, blanks + event.text)
                continue
            if event is POP:
                break
            edge = (anew, blanks) if event is LINE else event
            if event is LINE:
                anew, blanks = False, ""
            children = below[id(at)][1]
            if edge not in children:
                children[edge] = child = Tree()
                below[id(child)] = (child, {}, {})
                edges = at.closing if edge in CLOSING else at.edges
                edges.append((edge, child))  # type: ignore[arg-type]
            at = children[edge]
        if isinstance(end, Branch):
            at.rests.append(end)
        else:
            below[id(at)][2].setdefault(pending(end), []).extend(ids)
    for tree, _, ends in below.values():
        for ways, ids in ends.items():
            closes = any(token in CLOSING for tokens in ways for token in tokens)
            (tree.closing_ends if closes else tree.ends).append((ways, bits_of(ids)))
    _measure(root)
    return _shared(root, known)


def _shared(tree: Tree, known: dict[object, Tree]) -> Tree:
    tree.edges = [(edge, _shared(child, known)) for edge, child in tree.edges]
    tree.closing = [(edge, _shared(child, known)) for edge, child in tree.closing]
    parts: tuple[list[Any], ...] = (tree.ends, tree.closing_ends, tree.edges, tree.closing, tree.rests)
    return known.setdefault(tuple(tuple(part) for part in parts), tree)


def _measure(tree: Tree) -> None:
    edges = tree.edges + tree.closing
    for edge, child in edges:
        _measure(child)
        tree.pops |= child.pops and edge not in CLOSING
        tree.lines |= isinstance(edge, tuple) or (child.lines and edge not in CLOSING)
    tree.pops |= bool(tree.rests)
    tree.lines |= any(branch.begins_lines for branch in tree.rests)
    tree.size = 1 + len(tree.ends) + sum(child.size for _, child in edges) + 8 * len(tree.rests)


def bits_of(ids: Sequence[int]) -> int:
    """A number with these bits."""
    packed = bytearray(max(ids, default=0) // 8 + 1)
    for i in ids:
        packed[i >> 3] |= 1 << (i & 7)
    return int.from_bytes(packed, "little")
