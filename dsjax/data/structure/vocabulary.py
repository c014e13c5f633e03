"""The bytes that tokens stand for, and what tokens do once a lexer has read them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from dsjax.data.structure.language import Language
from dsjax.data.structure.lexer import Act, Mode, Place, read
from dsjax.data.tokenizer import Tokenizer
from dsjax.nn.fields import LEAF

# Names of the tokens around the parts of a text with a hole, wherever models have them: what is in front of the hole
# comes behind the first, what is behind it behind the second, what fills it behind the third.
_HOLES = (
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<PRE>", "<SUF>", "<MID>"),
)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What tokens stand for.

    Attributes:
        texts: the bytes of each token; none of a special one.
        hole: the tokens in front of the prefix, the suffix and the middle of a text with a hole; -1: there is none.
    """

    texts: Sequence[bytes]
    hole: tuple[int, int, int] = (-1, -1, -1)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """That of a tokenizer."""
        special = set(tokenizer.special_ids.values())
        names = tokenizer.names()
        spelt = byte_level_bytes if "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}" in names else marked_bytes  # its space
        texts = [b"" if i in special else spelt(name) for i, name in enumerate(names)]
        found = [tuple(tokenizer.special_ids.get(name, -1) for name in hole) for hole in _HOLES]
        return cls(texts, next((hole for hole in found if -1 not in hole), (-1, -1, -1)))  # type: ignore[arg-type]


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """The inverse of GPT-2's table: byte-level tokens are spelt with one printable character for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def byte_level_bytes(name: str) -> bytes:
    """The bytes that a token stands for in a byte-level tokenizer; an added token is spelt as it is."""
    table = _bytes_of_characters()
    return bytes(table[c] for c in name) if all(c in table for c in name) else name.encode()


def marked_bytes(name: str) -> bytes:
    """The same in a tokenizer with a mark for spaces, and single bytes as ``<0x0A>``."""
    if re.fullmatch("<0x[0-9A-F]{2}>", name):
        return bytes.fromhex(name[3:5])
    return name.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


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
