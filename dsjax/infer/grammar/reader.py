"""Reading Python byte by byte: where a text is, what may follow it, and the shortest way to its end."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import no_type_check

from dsjax.infer.grammar.endings import completions, pending, spelling
from dsjax.infer.grammar.lexer import FRONT, LINE, POP, START, Blank, Inside, Lex, Quote, between
from dsjax.infer.grammar.lr import Automaton, Node, read_rules
from dsjax.infer.grammar.python_syntax import GRAMMAR, NESTING, SPELLINGS

# Python's own limits are 200 brackets, 100 indentations, and a depth of its parser that differs between its versions;
# these are below all of them, and far above what people write.
MOST_BRACKETS, MOST_INDENTS, MOST_DEEP = 32, 50, 640

Nodes = tuple[Node, ...]


class Place:
    """Where a text is. There is one object of each.

    Attributes:
        lex: what token is begun.
        nodes: the stacks of the derivations that the text may be the beginning of.
        around: the brackets and f-strings that are open, without the last one, which ``lex`` knows.
        indents: the blanks of the blocks that are open.
        blanks: those at the beginning of this line, while nothing else is there.
        next: places behind tokens of a vocabulary, as far as known.
        row: the tokens that may follow, packed, if known.
        whole: whether the text may end here, if known.
    """

    __slots__ = ("around", "blanks", "indents", "lex", "next", "nodes", "row", "whole")

    def __init__(self, lex: Lex, nodes: Nodes, around: tuple[Inside, ...], indents: tuple[str, ...], blanks: str):
        self.lex, self.nodes, self.around, self.indents, self.blanks = lex, nodes, around, indents, blanks
        self.next: dict[int, Place | None] = {}
        self.row: object = None
        self.whole: bool | None = None


@functools.cache
def width(blanks: str) -> tuple[int, int]:
    """How wide an indentation is with tabs to multiples of eight, and with tabs as one blank."""
    column = 0
    for c in blanks:
        column = column + 1 if c == " " else (column // 8 + 1) * 8
    return column, len(blanks)


@no_type_check  # tests would check each call, and take ten times as long
class Reader:
    """Reads Python.

    Attributes:
        automaton: of its grammar.
        start: where an empty text is.
    """

    def __init__(self) -> None:
        weights = {token: len(text) + 1 for token, text in SPELLINGS.items()} | {"END": 0, "DEDENT": 0, "NEWLINE": 8}
        self.automaton = Automaton(read_rules(GRAMMAR), "file", weights=weights, deeper=NESTING, max_depth=MOST_DEEP)
        self._places: dict[object, Place] = {}
        self.start = self.place(START, (self.automaton.root,), (), (), "")

    def place(self, lex: Lex, nodes: Nodes, around: tuple[Inside, ...], indents: tuple[str, ...], blanks: str) -> Place:
        """The object of this place."""
        key = (lex, nodes, around, indents, blanks)
        found = self._places.get(key)
        if found is None:
            found = self._places[key] = Place(*key)
        return found

    @property
    def front(self) -> Place:
        """Where an empty text is whose first blank, if one follows, does not count."""
        return self.place(FRONT, self.start.nodes, (), (), "")

    @property
    def num_places(self) -> int:
        """How many places are known."""
        return len(self._places)

    def forget(self) -> None:
        """Lets go of all places that nobody holds; the start is another object then."""
        self.automaton.forget()
        self._places.clear()
        self.start = self.place(START, (self.automaton.root,), (), (), "")

    # ------------------------------------------------------------ one event

    def shift(self, node: Node, token: str, indents: tuple[str, ...]) -> tuple[Nodes, int]:
        """The stacks behind one more token, and the lowest depth that this depends on."""
        nodes, lowest = self.automaton.after(node, token)
        if token == "NEWLINE" and nodes and len(indents) >= MOST_INDENTS:
            inline, depth = self.automaton.after(node, "pass")  # a block that may stand in this line has to
            nodes, lowest = () if inline else nodes, min(lowest, depth)
        return nodes, lowest

    def line(self, node: Node, indents: tuple[str, ...], blanks: str) -> tuple[Nodes, tuple[str, ...], int]:
        """The stacks and open blocks where a line begins behind these blanks, and the lowest depth looked at."""
        nodes: Nodes = (node,)
        own, lowest, kept = width(blanks), node.depth, indents
        while kept and width(kept[-1])[0] > own[0]:
            nodes, depth = self._shift_all(nodes, "DEDENT")
            kept, lowest = kept[:-1], min(lowest, depth)
        top = width(kept[-1]) if kept else (0, 0)
        if own[0] > top[0]:
            if kept != indents or own[1] <= top[1]:
                return (), kept, lowest
            nodes, depth = self._shift_all(nodes, "INDENT")
            return nodes, (*kept, blanks), min(lowest, depth)
        return (nodes if own == top else ()), kept, lowest

    def _shift_all(self, nodes: Nodes, token: str) -> tuple[Nodes, int]:
        """The stacks behind one more token that is shifted whole."""
        moved = [self.automaton.after(node, token) for node in nodes]
        lowest = min((depth for _, depth in moved), default=10**9)
        return tuple(dict.fromkeys(node for found, _ in moved for node in found)), lowest

    def takes(self, node: Node, tokens: Sequence[str], indents: tuple[str, ...]) -> tuple[bool, int]:
        """Whether some tokens may follow, and the lowest depth looked at."""
        nodes: Nodes = (node,)
        lowest = node.depth
        for token in tokens:
            moved = [self.shift(n, token, indents) for n in nodes]
            lowest = min([lowest, *(depth for _, depth in moved)])
            nodes = tuple(n for found, _ in moved for n in found)
        return bool(nodes), lowest

    # ------------------------------------------------------------ texts

    def read(self, place: Place, text: bytes) -> Place | None:
        """Where the text is with some bytes more; None: nothing that goes on so is Python."""
        return self._viable(self._read(place, text)[0])

    def stop(self, place: Place, text: bytes) -> int:
        """How many of the bytes can follow."""
        low, high = 0, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.read(place, text[:middle]) else (low, middle - 1)
        return low

    def _viable(self, place: Place | None) -> Place | None:
        if place is None:
            return None
        for node in place.nodes:
            for tokens in pending(place.lex):
                if self.takes(node, tokens, place.indents)[0]:
                    return place
        return None

    def _read(self, place: Place, text: bytes) -> tuple[Place | None, int]:
        lex, nodes, around = place.lex, place.nodes, place.around
        indents, blanks = place.indents, place.blanks
        for number, byte in enumerate(text):
            moved = lex.step(byte)
            if moved is None:
                return None, number
            events, target = moved
            for event in events:
                if isinstance(event, str):
                    found = [n for node in nodes for n in self.shift(node, event, indents)[0]]
                    nodes = tuple(dict.fromkeys(found))
                elif isinstance(event, Inside):
                    nodes, around = nodes if len(around) < MOST_BRACKETS else (), (*around, event)
                elif event is POP:
                    target, around = between(around[-1]), around[:-1]
                elif event is LINE:
                    lines = [self.line(node, indents, blanks) for node in nodes]
                    nodes = tuple(dict.fromkeys(n for found, _, _ in lines for n in found))
                    indents, blanks = lines[0][1], ""
                elif isinstance(event, Blank):
                    blanks = "" if event.text is None else blanks + event.text
                if not nodes:
                    return None, number
            assert target is not None
            lex = target
        return self.place(lex, tuple(nodes), around, indents, blanks), len(text)

    def is_whole(self, place: Place) -> bool:
        """Whether the text may end here."""
        if place.whole is None:
            place.whole = place.lex.mode not in ("continued", "backslash") and self._ends(self._read(place, b"\n")[0])
        return place.whole

    def _ends(self, place: Place | None) -> bool:
        if place is None or place.lex is not START:
            return False
        nodes: Nodes = place.nodes
        for _ in place.indents:
            nodes = self._shift_all(nodes, "DEDENT")[0]
        return any(self.automaton.after(node, "END")[0] for node in nodes)

    # ------------------------------------------------------------ the end

    def ending(self, place: Place) -> bytes:
        """Bytes that make the text whole, few of them."""
        if self.is_whole(place):
            return b""
        for text in completions(place.lex):
            begun = text.encode(errors="surrogateescape")
            completed = self.read(place, begun)
            if completed is not None and completed.lex.mode not in ("str", "spec", "bol", "converted"):
                begun += b" "
                completed = self._read(completed, b" ")[0]
            if completed is not None:
                return begun + self._to_the_end(completed)
        raise AssertionError(f"no way on from {place.lex}")

    def _to_the_end(self, place: Place) -> bytes:
        """From between two tokens, by the cheapest of the tokens that make a sentence."""
        _, tokens = min((self.automaton.ending(node) for node in place.nodes), key=lambda found: found[0])
        indents, around, inside, parts = list(place.indents), list(place.around), place.lex.inside, list[str]()
        quote = place.lex.quote or inside.quote
        begins = place.lex is START
        if begins and place.blanks:
            parts.append("\n")
        for token in tokens:
            if token == "NEWLINE":
                parts.append("\n")
                begins = True
            elif token == "DEDENT":
                indents.pop()
            elif token == "INDENT":
                indents.append((indents[-1] if indents else "") + " ")
            elif token != "END":
                if begins:
                    parts.append(indents[-1] if indents else "")
                begins = False
                text, inside, quote = self._spelt(token, inside, around, quote)
                parts.append(text)
        return "".join(parts).encode()

    def _spelt(
        self, token: str, inside: Inside, around: list[Inside], quote: Quote | None
    ) -> tuple[str, Inside, Quote | None]:
        """A token as it is spelt there, what is around the next one, and the f-string that it is in."""
        if token == "FSTRING_END":
            assert quote is not None
            text, inside = quote.mark * (3 if quote.triple else 1), around.pop()
            return text, inside, inside.quote
        if token == "FIELD_END":
            return "}", inside, quote
        if token in ")]}":
            inside = around.pop()
            return token, inside, inside.quote
        if token in "([{":
            around.append(inside)
            inside = Inside(True, inside.quote, inside.spec)
            return token, inside, inside.quote
        return spelling(token) + " ", inside, quote
