"""The features of a text whose tokens say its layout."""

from __future__ import annotations

from typing import Any

from dsjax.data.structure.language import Language
from dsjax.data.structure.scanner import Scanner
from dsjax.data.structure.syntax import width
from dsjax.data.structure.vocabulary import Vocabulary
from dsjax.data.tokenizer import Tokenizer

_NO_TEXT = 2**31  # a token that there is not


class LayoutScanner(Scanner):
    """The features of one token after the other, where tokens stand for the form of texts (:mod:`dsjax.data.layout`).

    They are those of the text behind a token, with the blanks that will stand in front of what comes if no sign changes
    them: behind the end of a line, of the block that the next one belongs to as far as it is said.
    """

    def __init__(self, language: Language, tokenizer: Tokenizer):
        said = Vocabulary.of(tokenizer)
        self._said, self._writer = said.texts, tokenizer.writer()
        # What tokens add to texts: themselves, or a text that gets a number behind all of theirs.
        self._texts, self._numbers = list(said.texts), dict[bytes, int]()
        super().__init__(language, Vocabulary(self._texts, said.hole))

    def copied_into(self, other: Any) -> None:
        super().copied_into(other)
        other._writer = self._writer.copy()

    def _take(self, token: int) -> tuple[int, ...]:
        said = self._said[token] if 0 <= token < len(self._said) else b""
        if not said:
            writer = self._writer
            row = super()._take(token if 0 <= token < len(self._said) else _NO_TEXT)
            self._writer = writer
            writer.add(token)
            return row
        text = self._writer.add(token)
        if text == said:
            return super()._take(token)
        if not text:  # signs alone: the line to come belongs elsewhere
            row, self._before = self._row(None), None
            self.number += 1
            return row
        number = self._numbers.get(text)
        if number is None:
            number = self._numbers[text] = len(self._texts)
            self._texts.append(text)
        return super()._take(number)

    def _line_row(self) -> tuple[int, ...]:
        column = self.column
        self.column = width(self._writer.layout.waiting, column)
        row = super()._line_row()
        self.column = column
        return row
