"""The grammar of a request: what its text may go on with, token by token, until it is a whole program."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterable, Sequence

import numpy as np

from dsjax.config import UserError
from dsjax.data.tokenizer import Tokenizer
from dsjax.infer.grammar.masks import Masks
from dsjax.infer.grammar.reader import Reader
from dsjax.infer.grammar.spellings import ENDLESS
from dsjax.infer.grammar.vocabulary import token_bytes

MOST_DIGITS = 4000  # of a whole number; Python reads 4300
SPARE = 12  # tokens: by so many, one token may put the end farther away than it seemed
_DIGITS = frozenset(b"0123456789_")


class PythonGrammar:
    """Python, over the tokens of a vocabulary. What is found out about it serves all requests.

    Args:
        tokenizer: of the tokens.
        finish: whether a text that is about to run out of tokens is brought to an end, by tokens that are the shortest
            way there; without it, it is cut where it is.

    Raises:
        UserError: a tokenizer with which not every text can be written, or whose tokens stand for its layout.
    """

    def __init__(self, tokenizer: Tokenizer, *, finish: bool = True):
        if tokenizer.layout:
            raise UserError("a grammar reads the bytes of tokens; this tokenizer's are those of the layout of a text")
        self.finish, self.tokenizer, texts = finish, tokenizer, token_bytes(tokenizer)
        needed = {bytes([b]) for b in (*range(0x20, 0x7F), *b"\n", *range(0x80, 0xC0))}
        if missing := sorted(needed - set(texts)):
            raise UserError(
                f"a grammar needs a tokenizer with a token for each byte; this one has none for {missing[0]!r}"
            )
        self.masks = Masks(texts, Reader())
        self.ids = {text: i for i, text in enumerate(texts) if text}
        self.longest = max(map(len, texts))
        self.dropped = b" " if not tokenizer.decode([self.ids[b" "]]) else b""  # by the decoder, in front of a text
        starts = [i for i, text in enumerate(texts) if text[:1] and text[0] in _DIGITS]
        self.digits = packed(starts, len(texts))

    def warm_up(self, texts: Iterable[str]) -> None:
        """Finds out the masks along some programs before they are asked for: about 0.1 ms a token, remembered."""
        for text in texts:
            place = self.masks.reader.front if self.dropped else self.masks.reader.start
            for token in self.tokenizer.encode(text).tolist():
                self.masks.row(place)
                following = self.masks.after(place, token)
                if following is None:
                    break
                place = following
            self.masks.make_room()

    def begin(self, prompt: Sequence[int], end_ids: Sequence[int]) -> Constraint:
        """What may come behind a prompt.

        Args:
            prompt: token ids; special ones stand for no text. Without any the program begins behind another text:
                there the decoder drops no blank.
            end_ids: tokens that end a text; they may come where it is a whole program.

        Raises:
            UserError: the prompt is not the beginning of a program.
        """
        return Constraint(self, prompt, end_ids)


class Constraint:
    """What a text may go on with.

    Attributes:
        text: bytes so far, with the blank that the decoder drops.
        place: where they lead.
        no_end: Python has refused the text as it is, though the grammar would let it end.
    """

    def __init__(self, grammar: PythonGrammar, prompt: Sequence[int], end_ids: Sequence[int]):
        self.grammar, self.masks, reader = grammar, grammar.masks, grammar.masks.reader
        size = len(self.masks.texts)
        self._ends = packed([i for i in end_ids if i < size], size)  # a model may state ids that it has no text for
        self.text = bytearray().join(self.masks.texts[i] for i in prompt if i < len(self.masks.texts))
        self.no_end = False
        self._closing: bytes | None = None
        self._dropped = grammar.dropped if len(prompt) else b""
        place = reader.read(reader.front if self._dropped else reader.start, bytes(self.text))
        if place is None:
            raise UserError(not_a_beginning(self._program, reader.stop(reader.start, self._program)))
        self.place = place

    @property
    def _program(self) -> bytes:
        return bytes(self.text).removeprefix(self._dropped)

    def row(self, left: int) -> np.ndarray:
        """The tokens that may come next, a bit each, the first one the lowest: (ceil(V / 8),) uint8.

        Args:
            left: how many tokens may still come, the one that ends the text included.
        """
        self.masks.make_room()
        if self.no_end:
            self._closing = None
        elif self._closing is None and self.grammar.finish and self._runs_out(left):
            self._closing = self.masks.reader.ending(self.place)
        if self._closing is not None:
            begun = (self._closing[:n] for n in range(1, min(len(self._closing), self.grammar.longest) + 1))
            ids = [self.grammar.ids[text] for text in begun if text in self.grammar.ids]
            return packed(ids, len(self.masks.texts)) if ids else self._ends
        row = self.masks.row(self.place)
        if self.place.lex.mode == "number" and self.place.lex.text in ENDLESS and self._digits() >= MOST_DIGITS:
            row = row & ~self.grammar.digits
        return row | self._ends if not self.no_end and self.masks.reader.is_whole(self.place) else row

    def mask(self, size: int) -> np.ndarray:
        """Which of the first ``size`` tokens may come next, however many there may be: (size,) bool."""
        bits = np.unpackbits(self.row(10**9), bitorder="little").astype(bool)
        return np.pad(bits, (0, max(0, size - len(bits))))[:size]

    def _runs_out(self, left: int) -> bool:
        # The end is seldom far; it takes a while to find out how far.
        if left > 64 + SPARE + 4 * sum(node.depth for node in self.place.nodes[:1]):
            return False
        return len(self.masks.reader.ending(self.place)) + 1 + SPARE >= left

    def _digits(self) -> int:
        return len(self.text) - len(self.text.rstrip(bytes(_DIGITS)))

    def add(self, token: int) -> None:
        """Takes one more token, which is one of those that may come."""
        text, place = self.masks.texts[token], self.masks.after(self.place, token)
        assert place is not None, f"token {token}, {text!r}, may not come here"
        self.text += text
        self.place, self.no_end = place, False
        if self._closing is not None:
            self._closing = self._closing[len(text) :]

    def ends_well(self) -> bool:
        """Whether Python takes the text as it is. If not, it may not end here, whatever the grammar says."""
        self.no_end = not parses(self._program)
        return not self.no_end


def parses(text: bytes) -> bool:
    """Whether ``ast.parse`` takes a text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text.decode())
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return False
    return True


def packed(ids: Sequence[int], size: int) -> np.ndarray:
    """A bit for each of ``size`` ids, the first one the lowest: (ceil(size / 8),) uint8."""
    bits = np.zeros(-(-size // 8) * 8, bool)
    bits[np.asarray(ids, int)] = True
    return np.packbits(bits, bitorder="little")


def not_a_beginning(text: bytes, stop: int) -> str:
    """The sentence that tells where a text can not go on so."""
    before = text[:stop].decode(errors="replace")
    line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
    found = text[stop : stop + 20].decode(errors="replace")
    place = f"line {line}, column {column}"
    return f"the prompt is not the beginning of a Python program: {place}: {found!r} can not come there"
