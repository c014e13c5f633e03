"""What a model with structure is told of the tokens of a text: their features, found on the host as the tokens come."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int16

from dsjax.config import UserError
from dsjax.data.structure.scanner import Scanner
from dsjax.data.structure.stored import scanner
from dsjax.data.tokenizer import Tokenizer
from dsjax.nn.fields import NUM_FIELDS
from dsjax.nn.structure import StructureConfig


class Reading:
    """The features of the first tokens of a text (:mod:`dsjax.nn.fields`), and a scanner behind those.

    Args:
        scanner: behind what stands in front of the text.
        room: tokens that the text may come to.
    """

    def __init__(self, scanner: Scanner, room: int):
        self.scanner, self.length = scanner.copy(), 0
        self.features_SC = np.zeros((room, NUM_FIELDS), np.int16)

    def copy(self, room: int) -> Reading:
        """One that goes on from here by itself."""
        other = Reading(self.scanner, room)
        other.length = self.length
        other.features_SC[: self.length] = self.features_SC[: self.length]
        return other

    def scan(self, tokens: Sequence[int]) -> None:
        """Some more tokens."""
        begin, self.length = self.length, self.length + len(tokens)
        self.features_SC[begin : self.length] = self.scanner.scan(tokens)

    def feed(self, token: int) -> Int16[np.ndarray, " F"]:
        """The features of one more token."""
        self.features_SC[self.length] = found_C = self.scanner.feed(token)
        self.length += 1
        return found_C


def at_start(structure: StructureConfig | None, tokenizer: Tokenizer | None) -> Scanner | None:
    """A scanner at the beginning of a text, for a model with structure.

    Raises:
        UserError: there is no tokenizer.
    """
    if structure is None:
        return None
    if tokenizer is None:
        raise UserError("the model has structure, which is read from text: there must be a tokenizer")
    return scanner(structure.language, tokenizer)


def later(first: Scanner | None, before: Sequence[int], tokens: Sequence[int]) -> Callable[[], Reading] | None:
    """What reads some tokens, of a text that begins with those before them, when it is asked, and then once."""
    if first is None:
        return None

    @functools.cache
    def read() -> Reading:
        ahead = first.copy()
        ahead.scan(before)
        found = Reading(ahead, len(tokens))
        found.scan(tokens)
        return found

    return read
