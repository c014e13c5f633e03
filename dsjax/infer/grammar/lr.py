"""An LR automaton that follows several derivations at once, over stacks that share what they have in common.

The tables are those of SLR(1) (DeRemer 1971). Where they leave a choice, all choices are followed (Tomita 1985): a text
is then a few stacks instead of one, until what comes next tells. Each stack is a linked list whose nodes exist once, so
stacks are compared by identity, going back costs nothing, and what a node becomes is looked up after the first time.

A stack that has taken a terminal is the beginning of some sentence of the grammar (the correct-prefix property of LR
parsers), so there is always a way to the end; :meth:`Automaton.ending` gives the cheapest.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import no_type_check

Rule = tuple[str, tuple[str, ...]]


def read_rules(text: str) -> list[Rule]:
    """The rules of a grammar: lines ``name: symbols | symbols``, with ``symbol?`` for one that may be left out.

    A symbol in quotes is a terminal that is punctuation of this notation. A line that begins with a blank goes on.
    """
    rules: list[Rule] = []
    for line in text.replace("\n ", " ").splitlines():
        if not line.strip():
            continue
        name, _, right = line.partition(":")
        for alternative in f" {right} ".split(" | "):
            symbols = alternative.split()
            choices = [("", s[:-1]) if s.endswith("?") and len(s) > 1 else (s,) for s in symbols]
            for chosen in itertools.product(*choices):
                rules.append((name, tuple(s.strip("'") for s in chosen if s)))
                assert rules[-1][1], f"{name} may be empty: {line}"
    return rules


@no_type_check  # tests would check each call, and take ten times as long
class Node:
    """The top of a stack: a state of the automaton, on what is below it.

    Attributes:
        state: number.
        below: the rest of the stack.
        depth: nodes below.
        after: what terminals make of it, as far as known (see :meth:`Automaton.after`).
        ending: cost and terminals of its cheapest way to the end, if known.
    """

    __slots__ = ("above", "after", "below", "depth", "ending", "state")

    def __init__(self, state: int, below: Node | None):
        self.state, self.below = state, below
        self.depth: int = 0 if below is None else below.depth + 1
        self.above: dict[int, Node] | None = None  # most never get any
        self.after: dict[str, tuple[tuple[Node, ...], int]] | None = None
        self.ending: tuple[int, tuple[str, ...]] | None = None

    def down(self, steps: int) -> Node:
        """The node so many below."""
        node = self
        for _ in range(steps):
            assert node.below is not None
            node = node.below
        return node

    def states(self, lowest: int) -> tuple[int, ...]:
        """The states from the top down to depth ``lowest``."""
        found, node = [self.state], self
        while node.depth > lowest:
            assert node.below is not None
            node = node.below
            found.append(node.state)
        return tuple(found)


@dataclasses.dataclass
class State:
    """What can be done in a state of the automaton.

    Attributes:
        shifts: terminal -> state.
        goes: nonterminal -> state.
        reductions: terminal -> (nonterminal, how many symbols) of the rules that may be complete in front of it.
        begun: (nonterminal, symbols seen, symbols left) of the rules that are open.
    """

    shifts: dict[str, int]
    goes: dict[str, int]
    reductions: dict[str, list[tuple[str, int]]]
    begun: list[tuple[str, int, tuple[str, ...]]]


@no_type_check  # tests would check each call, and take ten times as long
class Automaton:
    """The automaton of a grammar.

    Args:
        rules: no right side is empty.
        start: nonterminal of a whole text.
        weights: cost of a terminal on the way to an end; 2 where not given.
        deeper: terminals that are refused on stacks of ``max_depth`` and more. None may be the only way on.
        max_depth: of a stack.
    """

    def __init__(
        self,
        rules: list[Rule],
        start: str,
        *,
        weights: Mapping[str, int] | None = None,
        deeper: Collection[str] = (),
        max_depth: int = 10**9,
    ):
        self.rules, self.start = rules, start
        self.names = {name for name, _ in rules}
        self.terminals = {s for _, right in rules for s in right} - self.names
        self.weights, self.deeper, self.max_depth = dict(weights or {}), frozenset(deeper), max_depth
        self._sentences = self._cheapest_sentences()
        self.states = list(self._states())
        self.root, self.num_nodes = Node(0, None), 1

    # ------------------------------------------------------------ tables

    def _states(self) -> Iterator[State]:
        """States in the order of their numbers: sets of items, (rule, symbols seen), that are told apart by kernels."""
        follow, by_name = self._follow(), dict[str, list[tuple[int, int]]]()
        for index, (name, _) in enumerate(self.rules):
            by_name.setdefault(name, []).append((index, 0))
        closed = {name: self._closure(name, by_name) for name in self.names}
        kernels = {frozenset(by_name[self.start]): 0}
        for kernel in (queue := list(kernels)):
            items = set(kernel)
            for rule, seen in kernel:
                right = self.rules[rule][1]
                if seen < len(right) and right[seen] in self.names:
                    items |= closed[right[seen]]
            state, further = State({}, {}, {}, []), dict[str, set[tuple[int, int]]]()
            for rule, seen in sorted(items):
                name, right = self.rules[rule]
                if seen < len(right):
                    further.setdefault(right[seen], set()).add((rule, seen + 1))
                else:
                    for terminal in follow[name]:
                        state.reductions.setdefault(terminal, []).append((name, seen))
                if (rule, seen) in kernel:
                    state.begun.append((name, seen, right[seen:]))
            for symbol, target in further.items():
                if (key := frozenset(target)) not in kernels:
                    kernels[key] = len(kernels)
                    queue.append(key)
                (state.goes if symbol in self.names else state.shifts)[symbol] = kernels[key]
            yield state

    def _closure(self, name: str, by_name: dict[str, list[tuple[int, int]]]) -> set[tuple[int, int]]:
        seen = {name}
        for other in (queue := [name]):
            firsts = {self.rules[rule][1][0] for rule, _ in by_name[other]} & self.names
            queue += sorted(firsts - seen)
            seen |= firsts
        return {item for other in seen for item in by_name[other]}

    def _follow(self) -> dict[str, set[str]]:
        """The terminals that can come behind each nonterminal."""
        first: dict[str, set[str]] = {name: set() for name in self.names} | {t: {t} for t in self.terminals}
        follow: dict[str, set[str]] = {name: set() for name in self.names}
        changed = True
        while changed:
            changed = False
            for name, right in self.rules:
                parts = [(first[name], first[right[0]]), *((follow[a], first[b]) for a, b in itertools.pairwise(right)
                                                           if a in self.names)]  # fmt: skip
                if right[-1] in self.names:
                    parts.append((follow[right[-1]], follow[name]))
                for target, source in parts:
                    if not source <= target:
                        target |= source
                        changed = True
        return follow

    def _cheapest_sentences(self) -> dict[str, tuple[int, tuple[str, ...]]]:
        best: dict[str, tuple[int, tuple[str, ...]]] = {}
        best |= {t: (self.weights.get(t, 2), (t,)) for t in self.terminals}
        changed = True
        while changed:
            changed = False
            for name, right in self.rules:
                if all(s in best for s in right):
                    cost = sum(best[s][0] for s in right)
                    if name not in best or cost < best[name][0]:
                        best[name] = cost, tuple(t for s in right for t in best[s][1])
                        changed = True
        assert self.names <= best.keys(), f"no sentence of {self.names - best.keys()}"
        return best

    # ------------------------------------------------------------ stacks

    def _put(self, state: int, below: Node) -> Node:
        if below.above is None:
            below.above = {}
        node = below.above.get(state)
        if node is None:
            node = below.above[state] = Node(state, below)
            self.num_nodes += 1
        return node

    def forget(self) -> None:
        """Lets go of all stacks but those that somebody holds."""
        self.root, self.num_nodes = Node(0, None), 1

    def after(self, node: Node, terminal: str) -> tuple[tuple[Node, ...], int]:
        """The stacks that a stack becomes with one more terminal, and the lowest depth that this depends on."""
        if node.after is None:
            node.after = {}
        found = node.after.get(terminal)
        if found is None:
            found = node.after[terminal] = self._after(node, terminal)
        return found

    def _after(self, node: Node, terminal: str) -> tuple[tuple[Node, ...], int]:
        if node.depth >= self.max_depth and terminal in self.deeper:
            return (), node.depth
        shifted, lowest, seen = dict[Node, None](), node.depth, {node}
        for top in (queue := [node]):
            state = self.states[top.state]
            if (target := state.shifts.get(terminal)) is not None:
                shifted[self._put(target, top)] = None
            for name, length in state.reductions.get(terminal, ()):
                below = top.down(length)
                lowest = min(lowest, below.depth)
                reduced = self._put(self.states[below.state].goes[name], below)
                if reduced not in seen:
                    seen.add(reduced)
                    queue.append(reduced)
        return tuple(shifted), lowest

    def ending(self, node: Node) -> tuple[int, tuple[str, ...]]:
        """Cost and terminals of the cheapest way from a stack to the end of a sentence (Dijkstra 1959)."""
        if node.ending is not None:
            return node.ending
        order, seen = itertools.count(), set[Node]()
        queue: list[tuple[int, int, Node | None, tuple[str, ...]]] = [(0, next(order), node, ())]
        while queue:
            cost, _, top, path = heapq.heappop(queue)
            if top is None:
                node.ending = cost, path
                return node.ending
            if top in seen:
                continue
            seen.add(top)
            if top.ending is not None:
                heapq.heappush(queue, (cost + top.ending[0], next(order), None, path + top.ending[1]))
                continue
            for name, length, left in self.states[top.state].begun:
                more = sum(self._sentences[s][0] for s in left)
                rest = path + tuple(t for s in left for t in self._sentences[s][1])
                below = top.down(length)
                reduced = None if name == self.start else self._put(self.states[below.state].goes[name], below)
                heapq.heappush(queue, (cost + more, next(order), reduced, rest))
        raise AssertionError("a stack that leads nowhere")
