"""Indentation said relative to the line before: a text in which only what changes of it is written down.

    def f(x):               def f(x):
        if x:                   if x:
            g()       <->       g()
        return x            <DEDENT>return x

A line's blanks (spaces and tabs at its beginning) are compared with those of the line before in its statement, or, if
it begins a statement, with those that the statement before began with: nothing is said of what is the same, `DEDENT`
for each level that ends, and what comes on top as it is. So what a statement of several lines (brackets, strings,
backslashes) was indented by within itself is forgotten at its end, and there are as many `DEDENT` as blocks end.

Every text has such a form, and whatever bytes there are, they are the form of some text. docs/layout.md has more.
"""

from __future__ import annotations

import bisect
import enum
import itertools
import re
from collections.abc import Sequence
from typing import Any, no_type_check

from dsjax.data.structure.nesting import Nesting

# Control characters that no code has a use for; they are signs in front of a line's first character, and nowhere else.
DEDENT = b"\x0f"  # shift in
IN_FULL = b"\x10"  # data link escape: a line's blanks stand behind it in full, and count for nothing later
# A level farther in is not remembered: what is said once would else be written on every line that follows.
WIDEST = 200
_LONGEST_TOKEN = 32  # bytes: of what is not longer, there are few different ones

_END = re.compile(rb"\r\n|\r|\n")
_LINE = re.compile(rb"([ \t]*)([^\r\n]*(?:\r\n|\r|\n)?)")


class Where(enum.Enum):
    """Where in a line a text is."""

    BEGIN = enum.auto()  # behind signs at most
    BLANKS = enum.auto()  # in those that come on top of the level
    FULL = enum.auto()  # in those that stand in full
    TEXT = enum.auto()


_TEXT = Where.TEXT  # looked up for each token

# What a line is indented by: the blanks, and the level around.
Level = tuple[bytes, Any]
OUTERMOST: Level = (b"", None)


@no_type_check  # tests would check each call, and take ten times as long
class Layout:
    """A place in a text, from which more of it is read in either form, however that is cut.

    Attributes:
        where: in the line.
        level: of the line, if no sign changes it.
    """

    __slots__ = ("_line", "_nesting", "_outside", "_statement", "_top", "level", "where")

    def __init__(self) -> None:
        self._nesting = Nesting()
        self._statement = self._line = OUTERMOST  # what the last statement and the last line were indented by
        self.where, self.level = Where.BEGIN, OUTERMOST
        self._top, self._outside = b"", True  # blanks on top of the level; whether the line began a statement

    def copy(self) -> Layout:
        """Another one at this place, in constant time."""
        other = Layout.__new__(Layout)
        for name in self.__slots__:
            setattr(other, name, getattr(self, name))
        other._nesting = self._nesting.copy()
        return other

    @property
    def waiting(self) -> bytes:
        """The blanks that stand in front of what comes, if no sign changes them."""
        return self.level[0] if self.where is Where.BEGIN else b""

    # ---------------------------------------------------------------- from the form to the text

    def write(self, said: bytes) -> bytes:
        """The text of some more of the form, without the blanks that wait for what comes."""
        if self.where is _TEXT and b"\n" not in said and b"\r" not in said:
            (self._nesting.read if len(said) <= _LONGEST_TOKEN else self._nesting.read_any)(said)
            return said
        out, at, size = bytearray(), 0, len(said)
        while at < size:
            if self.where is Where.TEXT:
                match = _END.search(said, at)
                end = size if match is None else match.end()
                self._nesting.read_any(said[at:end])
                out += said[at:end]
                at = end
                if match is not None:
                    self._begin_line()
                continue
            byte = said[at : at + 1]
            if byte in b"\r\n":
                self._nesting.read(byte)
                out += byte
                self._begin_line()
            elif byte in b" \t":
                out += self.waiting + byte
                if self.where is not Where.FULL:
                    self.where, self._top = Where.BLANKS, (self._top + byte)[: WIDEST + 1]
            elif self.where is Where.BEGIN and byte == DEDENT:
                self.level = self.level[1] or OUTERMOST
            elif self.where is Where.BEGIN and byte == IN_FULL:
                self.where = Where.FULL
            else:
                out += self.waiting
                self._begin_text()
                continue
            at += 1
        return bytes(out)

    def _begin_line(self) -> None:
        outside = self._nesting.is_outside
        # A sign in front of an empty line counts for the next one.
        if self.where is not Where.BEGIN or outside != self._outside:
            self.level = self._statement if outside else self._line
        self.where, self._outside, self._top = Where.BEGIN, outside, b""

    def _begin_text(self) -> None:
        """The line's first character comes: what later lines are compared with is known."""
        if self.where is not Where.FULL:
            blanks, top = self.level[0], self._top
            if top and len(blanks) + len(top) <= WIDEST:
                self.level = (blanks + top, self.level)
            self._line = self.level
            if self._outside:
                self._statement = self.level
        self.where = Where.TEXT

    # ---------------------------------------------------------------- from the text to the form

    def say(self, text: bytes, cuts: Sequence[int] = ()) -> list[bytes]:
        """The form of some more of a text, cut where the text is cut.

        Args:
            text: what comes.
            cuts: ascending places in it. One within a line's blanks means the one behind them.

        Returns:
            one part more than there are cuts; joined, they are the form.
        """
        begun = 0
        if self.where is not Where.BEGIN:  # what goes on with a line is said as it is
            match = _END.search(text)
            begun = len(text) if match is None else match.end()
            self.write(text[:begun])
        lines = [match.groups() for match in _LINE.finditer(text, begun) if match.end() > match.start()]
        out, places, at, size, code = [text[:begun]], [(0, 0, 0, 0)], begun, begun, 0
        for number, (blanks, rest) in enumerate(lines):
            is_aside = False
            if rest[:1] == b"#" and self._outside and blanks != self.level[0]:
                if code <= number:
                    code = next((i for i in range(number + 1, len(lines)) if _is_code(lines[i][1])), len(lines))
                is_aside = code < len(lines) and lines[code][0] != blanks
            sign = self._sign(blanks, rest, is_aside)
            out += (sign, rest)
            places.append((at, size, len(blanks), len(sign)))
            at, size = at + len(blanks) + len(rest), size + len(sign) + len(rest)
            self._nesting.read_any(rest)
            if rest[-1:] in (b"\n", b"\r"):
                self._begin_line()
        said, ends = b"".join(out), [_behind(places, cut) for cut in cuts]
        return [said[begin:end] for begin, end in itertools.pairwise((0, *ends, len(said)))]

    def _sign(self, blanks: bytes, rest: bytes, is_aside: bool) -> bytes:
        """What is said of a line's blanks, of which nothing was said yet; and goes on to its first character."""
        level = self.level
        if rest[:1] in (b"", b"\n", b"\r"):  # nothing comes behind them
            if not blanks:
                return b""
            self._top = blanks[len(level[0]) :]
            extends = blanks.startswith(level[0]) and self._top
            self.where = Where.BLANKS if extends else Where.FULL
            return self._top if extends else IN_FULL + blanks
        if is_aside or rest[:1] in (DEDENT, IN_FULL):
            self.where = Where.FULL
            self._begin_text()
            return IN_FULL + blanks
        ended = 0
        while not blanks.startswith(level[0]):
            level, ended = level[1], ended + 1
        self.level, self._top = level, blanks[len(level[0]) :]
        self._begin_text()
        return DEDENT * ended + blanks[len(level[0]) :]


def _is_code(rest: bytes) -> bool:
    """Whether a line is neither empty nor a comment."""
    return rest[:1] not in (b"", b"#", b"\n", b"\r")


def _behind(places: Sequence[tuple[int, int, int, int]], cut: int) -> int:
    """Where in the form a place of the text is: by places of lines in both, lengths of blanks, and of what is said."""
    at, said, blanks, sign = places[bisect.bisect_right(places, cut, key=lambda place: place[0]) - 1]
    into = cut - at
    return said if into == 0 else said + sign + max(into - blanks, 0)
