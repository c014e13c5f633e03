"""Whether the next line begins a statement: the brackets and strings that are open, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

from dsjax.data.structure.language import PYTHON
from dsjax.data.structure.lexer import START, Act, Mode, Place, read

_CLOSERS = {b"(": b")", b"[": b"]", b"{": b"}"}
_REACH = 100  # brackets, in which one that is closed is looked for
_WORD = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_" + bytes(range(128, 256))
_PREFIX = bytes({letter for word in PYTHON.prefixes for letter in word + word.upper()})
_LONGEST = max(map(len, PYTHON.prefixes))
# All that may open or end something. Of words only those in front of quotes, if they can belong to them.
_SIGNS = re.compile(
    rb"(?<![0-9A-Za-z_\x80-\xff])[%b]{1,%d}['\"]|['\"]|[()\[\]{}:#]|\\(?:\r\n|[\s\S])?|\r\n|\r|\n" % (_PREFIX, _LONGEST)
)


class Bracket(NamedTuple):
    """An open one, or an open string with fields.

    Attributes:
        closer: what ends it; empty: a string, which ends by itself.
        back: of a field, where its string goes on.
        fields: how many are open, itself included.
        around: the one that it stands in.
    """

    closer: bytes
    back: Place | None
    fields: int
    around: Any


class Here:
    """A place of the lexer, and what was found out about texts that come there."""

    __slots__ = ("entries", "place")

    def __init__(self, place: Place):
        self.place = place
        # What is to be done, where it leads, and what of the text is to be read from there.
        self.entries: dict[bytes, tuple[tuple[tuple[Act, Any], ...], Here, bytes]] = {}

    def enter(self, text: bytes) -> tuple[tuple[tuple[Act, Any], ...], Here, bytes]:
        """Finds it out."""
        actions, place, taken = read(PYTHON, self.place, text)
        told = tuple((act, argument) for act, argument in actions if act in _HANDLERS)
        entry = self.entries[text] = (told, here(place), text[taken:])
        return entry


_HERE: dict[Place, Here] = {}


def here(place: Place) -> Here:
    """The one of a place."""
    found = _HERE.get(place)
    if found is None:
        found = _HERE[place] = Here(place)
    return found


@no_type_check  # tests would check each call, and take ten times as long
class Nesting:
    """What is open at a place in a Python text, known in every text.

    What closes nothing is passed over, and what closes another kind closes what stands in it, as in
    :class:`dsjax.data.structure.syntax.Syntax`.
    """

    __slots__ = ("_goes_on", "_here", "_open")

    def __init__(self) -> None:
        self._here = here(START)
        self._open: Bracket | None = None
        self._goes_on: Place | None = None  # where the lexer goes on, if that is elsewhere than it says

    def copy(self) -> Nesting:
        """Another one at this place, in constant time."""
        other = Nesting.__new__(Nesting)
        other._here, other._open, other._goes_on = self._here, self._open, None
        return other

    @property
    def is_outside(self) -> bool:
        """Whether a line that begins here begins a statement (or is empty, or a comment between statements)."""
        return self._open is None and self._here.place.mode is Mode.LINE

    def read(self, text: bytes) -> None:
        """Some more of the text. What it does is remembered, so that there should be few different ones."""
        while text:
            actions, self._here, text = self._here.entries.get(text) or self._here.enter(text)
            for act, argument in actions:
                _HANDLERS[act](self, argument)
            if self._goes_on is not None:
                self._here, self._goes_on = here(self._goes_on), None

    def read_any(self, text: bytes) -> None:
        """The same for texts of any number and length: all but what may open or end something is passed over."""
        at = 0
        if self._here.place.begun:  # of which the first byte may be a part
            self.read(text[:1])
            at = 1
        for match in _SIGNS.finditer(text, at):
            sign = match[0]
            if match.start() > at:  # something stands between: it leaves behind a word that is no prefix, or none
                sign = (b"," if sign[0] in _PREFIX else b"0") + sign
            self.read(sign)
            at = match.end()
        rest = text[at:]
        word = rest[len(rest.rstrip(_WORD)) :]  # which may go on
        if len(word) < len(rest):
            self.read(b",")
        self.read(word if len(word) <= _LONGEST else b"0" * (_LONGEST + 1))

    # ---------------------------------------------------------------- what the lexer tells

    def _push(self, closer: bytes, back: Place | None = None) -> None:
        fields = 0 if self._open is None else self._open.fields
        self._open = Bracket(closer, back, fields + (back is not None), self._open)

    def _on_open(self, opener: bytes) -> None:
        self._push(_CLOSERS[opener])

    def _on_close(self, closer: bytes) -> None:
        found = self._open
        for _ in range(_REACH):
            if found is None or found.closer == closer or found.back is not None or not found.closer:
                break
            found = found.around
        if found is None or found.closer != closer:
            return
        self._open = found.around
        if found.back is not None:
            self._goes_on = found.back
        elif self._open is not None and self._open.fields:
            self._goes_on = Place(Mode.CODE, level=1 if self._open.back is not None else 2)

    def _on_format(self, _: None) -> None:
        self._push(b"")

    def _on_format_end(self, _: None) -> None:
        while self._open is not None:
            ended, self._open = self._open, self._open.around
            if not ended.closer:
                break

    def _on_field(self, back: Place) -> None:
        self._push(b"}", back)

    def _on_no_field(self, _: None) -> None:
        assert self._open is not None
        self._goes_on, self._open = self._open.back, self._open.around

    def _on_spec(self, _: None) -> None:
        if self._open is not None and self._open.back is not None:
            self._goes_on = self._open.back._replace(mode=Mode.SPEC)


_HANDLERS: dict[Act, Callable[[Nesting, Any], None]] = {
    Act.OPEN: Nesting._on_open,
    Act.CLOSE: Nesting._on_close,
    Act.FORMAT: Nesting._on_format,
    Act.FORMAT_END: Nesting._on_format_end,
    Act.FIELD: Nesting._on_field,
    Act.NO_FIELD: Nesting._on_no_field,
    Act.SPEC: Nesting._on_spec,
}
