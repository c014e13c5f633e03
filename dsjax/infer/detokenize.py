"""Text from tokens as they come, no character in halves, and where it must stop."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Sequence

from dsjax.config import UserError
from dsjax.data.tokenizer import Tokenizer

CUT = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 8  # tokens of a prompt that the text of the next may depend on: a first word may lack the space before it
CHARACTER = 4  # tokens of one character at the most: its bytes
MOST = 64  # tokens that are no text so far: they will not become any


class Detokenizer:
    """Tokens in, text out as soon as it is certain.

    What it gives, joined, is the text of all tokens together, up to the first stop string. A character whose bytes are
    not all there is kept back, and so is what may turn out to be the beginning of a stop string. Where the text stops
    does not depend on how it is cut into tokens.

    Args:
        tokenizer: of the tokens.
        stop: the text ends in front of the one of these that is complete first.
        before: the tokens in front, whose text is not given again.
        healed: a token that the first one stands in for: the text of this one is not given again either (see
            :func:`dsjax.infer.engine.heal`).

    Attributes:
        stopped: a stop string came; there is no more text.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, before: Sequence[int] = (), healed: int | None = None
    ):
        check_stop(stop)
        self._stop = tuple(stop)
        self._source: _Window | _Written = (
            _Written(tokenizer, before, healed) if tokenizer.layout else _Window(tokenizer, before, healed)
        )
        self._held, self.stopped = "", False

    def add(self, token: int) -> str:
        """The text that one more token makes certain."""
        return self._released(self._source.add(token))

    def end(self) -> str:
        """The rest, behind the last token: half a character is told as U+FFFD."""
        return self._released(self._source.end(), last=True)

    def _released(self, new: str, last: bool = False) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        begun = (n for n in range(min(longest, len(text)), 0, -1) if self._begins_a_stop(text[-n:]))
        size = len(text) - (0 if last else next(begun, 0))
        self._held = text[size:]
        return text[:size]

    def _begins_a_stop(self, text: str) -> bool:
        return any(len(stop) > len(text) and stop.startswith(text) for stop in self._stop)


class _Window:
    """What tokens add to a text, by the text of the last few."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], healed: int | None):
        self._tokenizer = tokenizer
        start, text = self._behind([*before, *([] if healed is None else [healed])])
        # The last tokens; where among them a character ended last; how much of their text has been dealt with.
        self._ids, self._whole, self._shown = list(before[start:]), 0, len(text)

    def _behind(self, ids: Sequence[int]) -> tuple[int, str]:
        """Where the last tokens begin, and their text, both without halves of characters.

        A decoder may take all the bytes of a text for none, if one character among them lacks some.
        """
        last, most = max(0, len(ids) - CONTEXT), CHARACTER - 1
        starts, ends = range(last, max(last - most, 0) - 1, -1), range(len(ids), max(len(ids) - most, 0) - 1, -1)
        for end, start in itertools.product(ends, starts):
            text = self._text(ids[start:end])
            if text == text.strip(CUT):
                return start, text
        return last, self._text(ids[last:]).rstrip(CUT)

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)

    def add(self, token: int) -> str:
        self._ids.append(token)
        text = self._text(self._ids)
        certain = text if len(self._ids) > MOST else text.rstrip(CUT)
        new, self._shown = certain[self._shown :], max(self._shown, len(certain))
        if certain == text:  # what comes depends on nothing but the last characters, if at all
            if last := self._text(self._ids[self._whole :]):
                self._ids, self._shown = self._ids[self._whole :], len(last)
            self._whole = len(self._ids)
        return new

    def end(self) -> str:
        text = self._text(self._ids)
        new, self._shown = text[self._shown :], len(text)
        return new


class _Written:
    """What tokens of a tokenizer with layout add to a text, which depends on all that stand in front."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], healed: int | None):
        self._writer, self._decoder = tokenizer.writer(before), codecs.getincrementaldecoder("utf-8")("replace")
        self._known = "" if healed is None else self._writer.copy().add(healed).decode(errors="ignore")

    def add(self, token: int) -> str:
        return self._unknown(self._decoder.decode(self._writer.add(token)))

    def end(self) -> str:
        return self._unknown(self._decoder.decode(b"", final=True))

    def _unknown(self, text: str) -> str:
        """The text without what the token that was chosen again had given already."""
        same = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, self._known, strict=False))
        )
        self._known = self._known[same:] if same == len(text) else ""
        return text[same:]


def check_stop(stop: Sequence[str]) -> None:
    """Raises UserError if a stop string is empty, or no text."""
    if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
        raise UserError(f"stop is {stop!r}; it is a list of texts that are not empty")
