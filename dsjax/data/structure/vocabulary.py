"""The bytes that tokens stand for, and what tokens do once a lexer has read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from dsjax.data.structure.language import Language
from dsjax.data.structure.lexer import Act, Mode, Place, read
from dsjax.data.token_names import NO_HOLE, Hole, bytes_of, hole_of
from dsjax.data.tokenizer import Tokenizer
from dsjax.nn.fields import LEAF


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What tokens stand for.

    Attributes:
        texts: the bytes of each token; none of a special one.
        hole: the tokens in front of the prefix, the suffix and the middle of a text with a hole; -1: there is none.
    """

    texts: Sequence[bytes]
    hole: Hole = NO_HOLE

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """That of a tokenizer."""
        return cls(bytes_of(tokenizer.names(), tokenizer.special_ids), hole_of(tokenizer.special_ids))


class State:
    """A place of the lexer, and what tokens do from there on, as far as any came.

    Attributes:
        place: where it is.
        is_word, is_line: whether that is in a word, or in the white space that a line begins with.
        leaf: what the text ends in, as far as the place says it; None: it does not.
        entries: by token, or by token and number of bytes that were read before: the actions, the state behind them,
            how many bytes were read; -1: all.
    """

    __slots__ = ("entries", "is_line", "is_word", "leaf", "place")

    def __init__(self, language: Language, place: Place):
        self.place, self.entries = place, dict[Any, tuple[tuple[tuple[Any, Any], ...], State, int]]()
        self.is_word, self.is_line = place.mode is Mode.WORD, place.mode is Mode.LINE
        name = {
            Mode.COMMENT: "comment",
            Mode.LONG_COMMENT: "comment",
            Mode.STRING: "format" if place.formatted else "string",
            Mode.QUOTES: "format" if place.formatted else "string",
            Mode.SPEC: "format",
            Mode.FIELD: "{",
        }.get(place.mode)
        if place.mode is Mode.CODE and place.begun:
            name = sign_leaf(language, place.begun)
        self.leaf = None if name is None else LEAF[name]


def sign_leaf(language: Language, sign: bytes) -> str:
    """The leaf of a sign."""
    if sign in (b",", b";"):
        return sign.decode()
    return language.signs.get(sign, "other")


class Lexicon:
    """What the tokens of a vocabulary do in the text of a language; filled in as it is used, by any number of scanners.

    Attributes:
        language, vocabulary: which.
    """

    def __init__(self, language: Language, vocabulary: Vocabulary, handlers: dict[Act, Callable[..., None]]):
        self.language, self.vocabulary, self._handlers = language, vocabulary, handlers
        self._states: dict[Place, State] = {}

    def state(self, place: Place) -> State:
        """The state at a place."""
        found = self._states.get(place)
        if found is None:
            found = self._states[place] = State(self.language, place)
        return found

    def entry(self, state: State, token: int, start: int = 0) -> tuple[tuple[tuple[Any, Any], ...], State, int]:
        """What a token does, from its byte ``start`` on (see :class:`State`)."""
        text = self.vocabulary.texts[token]
        actions, place, taken = read(self.language, state.place, text[start:])
        end = start + taken
        told = tuple((self._handlers[act], argument) for act, argument in actions if act in self._handlers)
        entry = (told, self.state(place), -1 if end == len(text) else end)
        state.entries[(token, start) if start else token] = entry
        return entry
