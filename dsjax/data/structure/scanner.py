"""The features of a text as its tokens come.

They depend on what has come so far and on nothing else, whatever the text is. A parser that looks ahead, or that mends
an error by what follows, would tell a model in training what it is about to predict.
"""

from __future__ import annotations

import array
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int16

from dsjax.data.structure.language import Language
from dsjax.data.structure.lexer import START
from dsjax.data.structure.nodes import WAITING
from dsjax.data.structure.syntax import DOT, HANDLERS, HIGHEST, NAME, Syntax
from dsjax.data.structure.vocabulary import Lexicon, Vocabulary
from dsjax.nn.fields import (
    BALANCES,
    BRACKETS,
    COLUMN,
    DEPTHS,
    FARTHEST,
    FLOOR,
    KIND,
    LEAF,
    NUM_FIELDS,
    PLACES,
    POINTERS,
)

# What a token leaves behind: the number of its context, leaf, place, floor, and the tokens that it points to.
_RAW, _FLOOR = 4 + len(POINTERS), 3
_IN_CONTEXT = [COLUMN[name] for name in ("statement", "kind", "kind_2", "kind_3", "previous", "definition", "depth",
                                         "brackets", "sibling", "item", "balance")]  # fmt: skip
_LINE, _NEWLINE, _SPECIAL = LEAF["line"], LEAF["newline"], LEAF["special"]


class Scanner(Syntax):
    """The features of one token after the other (:mod:`dsjax.nn.fields`).

    Args:
        language: of the text.
        vocabulary: of the tokens.
        lexicon: of another scanner of the same language and vocabulary, to share what it has found out about tokens.

    A special token begins a text of its own. Of the three around the parts of a text with a hole, the one in front of
    the middle goes back to the end of the prefix instead; how many brackets the suffix closes and did not open is known
    from then on (``balance``).
    """

    def __init__(self, language: Language, vocabulary: Vocabulary, *, lexicon: Lexicon | None = None):
        super().__init__(language)
        self.lexicon = lexicon or Lexicon(language, vocabulary, HANDLERS)
        self._state = self.lexicon.state(START)
        self._contexts, self._context, self._expected = array.array("h"), -1, -1
        self._before: tuple[int, ...] | None = None  # what the last token left behind
        self._prefix: Scanner | None = None  # where a text with a hole goes on behind the suffix

    def copy(self) -> Scanner:
        """One that goes on from here by itself. It takes time in proportion to what is open and bound."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._contexts, other._context, other._before = array.array("h"), -1, None
        self.copied_into(other)
        return other

    def feed(self, token: int) -> Int16[np.ndarray, " F"]:
        """The features behind one more token."""
        number = self.number
        context, leaf, place, floor, *points = self._take(token)
        size = len(_IN_CONTEXT)
        *shown, balance = self._contexts[context * size : (context + 1) * size]
        ended = floor + 1 if floor < HIGHEST else 0
        backs = [number - at if at >= 0 and number - at <= FARTHEST else 0 for at in points]
        return np.array([leaf, *shown, min(place, PLACES - 1), balance, ended, *backs], np.int16)

    def scan(self, tokens: Sequence[int] | np.ndarray) -> Int16[np.ndarray, "T F"]:
        """The features behind each of some more tokens, int16."""
        self._contexts, self._context, self._before = array.array("h"), -1, None
        first, raw, take = self.number, array.array("q"), self._take
        for token in tokens.tolist() if isinstance(tokens, np.ndarray) else tokens:
            raw.extend(take(token))
        return self._features(np.frombuffer(raw, np.int64).reshape(-1, _RAW), first)

    def _take(self, token: int) -> tuple[int, ...]:
        """What one more token leaves behind."""
        before, row = self._state, self._before
        entry = before.entries.get(token)
        if entry is None:
            texts = self.lexicon.vocabulary.texts
            if not 0 <= token < len(texts) or not texts[token]:
                self._special(token)
                row, self._before = self._row(_SPECIAL), None
                self.number += 1
                return row
            entry = self.lexicon.entry(before, token)
        actions, state, end = entry
        if actions or state is not before or row is None:
            self._state = state
            for act, argument in actions:
                act(self, argument)
            if end >= 0 or self.goes_on is not None:
                self._rest(token, end)
            row = self._before = self._row(None)
        elif row[_FLOOR] != HIGHEST:  # nothing happened: all is as behind the token before
            row = self._before = (*row[:_FLOOR], HIGHEST, *row[_FLOOR + 1 :])
        self.number += 1
        return row

    def _rest(self, token: int, start: int) -> None:
        """The bytes of a token behind the place where the lexer asked how to go on."""
        while True:
            if self.goes_on is not None:
                self._state, self.goes_on = self.lexicon.state(self.goes_on), None
            if start < 0:
                return
            state = self._state
            entry = state.entries.get((token, start)) or self.lexicon.entry(state, token, start)
            actions, self._state, start = entry
            for act, argument in actions:
                act(self, argument)

    def _special(self, token: int) -> None:
        _, hole, end = self.lexicon.vocabulary.hole
        if token == end and self._prefix is not None:
            keep = {"number": self.number, "_contexts": self._contexts, "_expected": self.unmatched}
            self.__dict__.update(self._prefix.copy().__dict__ | keep | {"_context": -1, "_prefix": None})
            return
        self._prefix = self.copy() if token == hole else None
        self.begin()
        self._state, self._context, self._expected = self.lexicon.state(START), -1, -1

    # ---------------------------------------------------------------- what a token leaves behind

    def _row(self, leaf: int | None) -> tuple[int, ...]:
        state, top, name_at = self._state, self.stack[-1], -1
        if leaf is None:
            leaf = self.leaf if state.leaf is None else state.leaf
            if state.is_word:
                leaf = self.word_leaf(self.word)
                if leaf == NAME:
                    name_at = self.bound(b"." + self.word if self.leaf == DOT else self.word)
            elif state.is_line:
                if top.column is not None and self.language.indentation:
                    return self._line_row()
                leaf = _NEWLINE if top.column is not None else _LINE
        if self.dirty or self._context < 0:
            self._context, self.dirty = self._context_of(len(self.stack) - 1), False
        floor, self.floor = self.floor, HIGHEST
        bracket_at = -1 if top.column is not None else top.at
        return self._context, leaf, self.place, floor, self.stack[top.block].at, bracket_at, name_at

    def _line_row(self) -> tuple[int, ...]:
        """At the beginning of a line: the blocks that stay open if a statement begins at this column."""
        stack, column = self.stack, self.column
        i = len(stack) - 1
        while i and column < (stack[i].column or 0) < WAITING:
            i -= 1
        floor, self.floor = self.floor, HIGHEST
        return self._context_of(i), _NEWLINE, 0, floor, stack[i].at, -1, -1

    def _context_of(self, i: int) -> int:
        """The number of the context of node ``i`` of the stack: what stays the same over many tokens."""
        stack = self.stack
        node = stack[i]
        block, balance = stack[node.block], 0
        if self._expected >= 0:
            balance = min(max(BALANCES // 2 + 1 + node.brackets - self._expected, 1), BALANCES - 1)
        self._contexts.extend((
            KIND[self.statement],
            node.number,
            stack[i - 1].number if i else 0,
            stack[i - 2].number if i > 1 else 0,
            block.previous,
            node.definition,
            node.depth if node.depth < DEPTHS else DEPTHS - 1,
            node.brackets if node.brackets < BRACKETS else BRACKETS - 1,
            block.siblings if block.siblings < PLACES else PLACES - 1,
            node.items if node.items < PLACES else PLACES - 1,
            balance,
        ))  # fmt: skip
        return len(self._contexts) // len(_IN_CONTEXT) - 1

    def _features(self, raw: np.ndarray, first: int) -> np.ndarray:
        out = np.zeros((len(raw), NUM_FIELDS), np.int16)
        if not len(raw):
            return out
        contexts = np.frombuffer(self._contexts, np.int16).reshape(-1, len(_IN_CONTEXT))
        out[:, _IN_CONTEXT] = contexts[raw[:, 0]]
        out[:, COLUMN["leaf"]], out[:, COLUMN["place"]] = raw[:, 1], np.minimum(raw[:, 2], PLACES - 1)
        out[:, FLOOR] = np.where(raw[:, 3] < HIGHEST, raw[:, 3] + 1, 0)
        back = np.arange(first, first + len(raw))[:, None] - raw[:, 4:]
        pointers = list(POINTERS.values())
        out[:, pointers] = np.where((raw[:, 4:] >= 0) & (back <= FARTHEST), back, 0)
        return out
