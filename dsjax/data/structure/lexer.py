"""From the bytes of tokens to words, signs, strings and line ends, wherever tokens cut them.

A lexer is a finite machine: what a token does depends on its bytes and on a :class:`Place` alone, so it is worked out
once for each pair and looked up from then on. What does not fit in a finite machine, such as which string a closing
brace leads back into, it leaves to whoever counts brackets: there it stops, and is told where to go on.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

from dsjax.data.structure.language import Language

SPACE, NEWLINE, BLANK = b" \t\x0c\x0b", b"\r\n", b" \t\x0c"
OPENERS, CLOSERS = b"([{", b")]}"
_WORD = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_") | frozenset(range(128, 256))


class Mode(enum.Enum):
    """What the next byte belongs to."""

    CODE = enum.auto()
    LINE = enum.auto()  # the white space that a line begins with
    WORD = enum.auto()
    CONTINUED = enum.auto()  # behind a backslash
    COMMENT = enum.auto()
    LONG_COMMENT = enum.auto()
    QUOTES = enum.auto()  # one or two quotes: of what string is open
    STRING = enum.auto()
    SPEC = enum.auto()  # in a field of a string, behind its colon
    FIELD = enum.auto()  # directly behind the brace that opened a field: another one takes it back


class Place(NamedTuple):
    """Where in the text a lexer is, as far as the next bytes depend on it.

    Attributes:
        mode: what the next byte belongs to.
        quote: what ends the string; with ``raw``, ``formatted``: what kind of a string.
        level: of code: 0, in no string; 1, directly in a field of one; 2, in a bracket there.
        begun: what the next byte may belong to: a sign, a prefix of a string, an escape, quotes.
    """

    mode: Mode
    quote: bytes = b""
    raw: bool = False
    formatted: bool = False
    level: int = 0
    begun: bytes = b""


class Act(enum.Enum):
    """What a lexer tells; with some comes a text or a place."""

    PIECE = enum.auto()  # more of a word
    WORD_END = enum.auto()
    WORD_IS_PREFIX = enum.auto()  # the word so far belongs to the string that begins now
    SIGN = enum.auto()
    OPEN = enum.auto()
    CLOSE = enum.auto()
    STRING = enum.auto()
    STRING_END = enum.auto()
    FORMAT = enum.auto()  # a string with fields begins
    FORMAT_END = enum.auto()
    FIELD = enum.auto()  # of the string at this place
    NO_FIELD = enum.auto()
    SPEC = enum.auto()
    COMMENT = enum.auto()
    BLANKS = enum.auto()  # at the beginning of a line
    LINE_BEGIN = enum.auto()  # behind them: something that is no comment
    NEWLINE = enum.auto()
    DIRECTIVE = enum.auto()


Action = tuple[Act, Any]
START = Place(Mode.LINE)


def read(language: Language, place: Place, text: bytes) -> tuple[list[Action], Place, int]:
    """What is told while ``text`` is read from ``place`` on, the place behind it, and how many bytes were read.

    All of them, but where the place behind an action depends on open brackets: who keeps those says it.
    """
    actions: list[Action] = []
    tell = actions.append
    at, size = 0, len(text)
    while at < size:
        step = _STEPS[place.mode](language, place, text[at : at + 1], tell)
        place, taken, stops = step
        at += taken
        if stops:
            break
    return _joined(actions), place, at


def _joined(actions: Sequence[Action]) -> list[Action]:
    """Texts that follow one another as one."""
    out: list[Action] = []
    for act, text in actions:
        if out and act in (Act.PIECE, Act.BLANKS) and out[-1][0] is act:
            out[-1] = (act, out[-1][1] + text)
        elif not (out and act in (Act.COMMENT, Act.NEWLINE) and out[-1][0] is act):
            out.append((act, text))
    return out


# ---------------------------------------------------------------- one byte

# (place behind it, whether the byte was taken, whether to stop): not taken, it is read again from there.
Step = tuple[Place, int, bool]


def _code(language: Language, place: Place, byte: bytes, tell: Any) -> Step:
    begun = place.begun
    if begun:
        if begun + byte in language.beginnings:
            begun += byte
            if begun == language.line_comment:
                return _enter_comment(place, Mode.COMMENT, tell)
            if language.block_comment and begun == language.block_comment[0]:
                return _enter_comment(place, Mode.LONG_COMMENT, tell)
            return place._replace(begun=begun), 1, False
        tell((Act.SIGN, begun))
        return place._replace(begun=b""), 0, False
    code = byte[0]
    if code in SPACE:
        return place, 1, False
    if code in NEWLINE:
        tell((Act.NEWLINE, None))
        return place._replace(mode=Mode.LINE), 1, False
    if code in _WORD:
        tell((Act.PIECE, byte))
        return place._replace(mode=Mode.WORD, begun=_prefix(language, byte)), 1, False
    if code in language.quotes:
        return _quote(language, place, byte, b"", tell)
    if code in OPENERS:
        tell((Act.OPEN, byte))
        return place._replace(level=2 if place.level else 0), 1, False
    if code in CLOSERS:
        tell((Act.CLOSE, byte))
        return place, 1, place.level > 0
    if byte in b",;":
        tell((Act.SIGN, byte))
        return place, 1, False
    if byte == b"\\":
        return place._replace(mode=Mode.CONTINUED), 1, False
    if byte == b":" and place.level == 1:
        tell((Act.SPEC, None))
        return place, 1, True
    if byte == language.line_comment:
        return _enter_comment(place, Mode.COMMENT, tell)
    return place._replace(begun=byte), 1, False


def _enter_comment(place: Place, mode: Mode, tell: Any) -> Step:
    tell((Act.COMMENT, None))
    return place._replace(mode=mode, begun=b""), 1, False


def _prefix(language: Language, word: bytes) -> bytes:
    """The word, as long as it may be a prefix of a string."""
    return word.lower() if word.lower() in language.prefix_beginnings else b""


def _quote(language: Language, place: Place, quote: bytes, prefix: bytes, tell: Any) -> Step:
    raw, formatted = any(c in prefix for c in language.raw), any(c in prefix for c in language.formatted)
    tell((Act.FORMAT if formatted else Act.STRING, None))
    mode, begun = (Mode.QUOTES, quote) if language.long_quotes else (Mode.STRING, b"")
    return Place(mode, quote, raw, formatted, place.level, begun), 1, False


def _line(language: Language, place: Place, byte: bytes, tell: Any) -> Step:
    code = byte[0]
    if code in BLANK:
        tell((Act.BLANKS, byte))
        return place, 1, False
    if code in NEWLINE:
        tell((Act.NEWLINE, None))
        return place, 1, False
    code_place = place._replace(mode=Mode.CODE)
    if byte == language.line_comment:
        return code_place, 0, False
    tell((Act.LINE_BEGIN, None))
    if byte == language.directive:
        tell((Act.DIRECTIVE, None))
        return code_place, 1, False
    return code_place, 0, False


def _word(language: Language, place: Place, byte: bytes, tell: Any) -> Step:
    if byte[0] in _WORD:
        tell((Act.PIECE, byte))
        return place._replace(begun=_prefix(language, place.begun + byte) if place.begun else b""), 1, False
    if byte[0] in language.quotes and place.begun in language.prefixes:
        tell((Act.WORD_IS_PREFIX, None))
        return _quote(language, place, byte, place.begun, tell)
    tell((Act.WORD_END, None))
    return place._replace(mode=Mode.CODE, begun=b""), 0, place.level > 0


def _continued(language: Language, place: Place, byte: bytes, tell: Any) -> Step:
    code = place._replace(mode=Mode.CODE, begun=b"")
    if byte == b"\n":
        return code, 1, False
    if byte == b"\r" and not place.begun:
        return place._replace(begun=byte), 1, False
    return code, 0, False


def _comment(language: Language, place: Place, byte: bytes, tell: Any) -> Step:
    if byte[0] in NEWLINE:
        tell((Act.NEWLINE, None))
        return place._replace(mode=Mode.LINE), 1, False
    return place, 1, False


def _long_comment(language: Language, place: Place, byte: bytes, tell: Any) -> Step:
    assert language.block_comment is not None
    begun = (place.begun + byte)[-len(language.block_comment[1]) :]
    if begun == language.block_comment[1]:
        return place._replace(mode=Mode.CODE, begun=b""), 1, False
    return place._replace(begun=begun), 1, False


# ---------------------------------------------------------------- strings


def _quotes(language: Language, place: Place, byte: bytes, tell: Any) -> Step:
    """Behind one or two quotes."""
    if byte == place.quote:
        if len(place.begun) == 2:
            return place._replace(mode=Mode.STRING, quote=3 * byte, begun=b""), 1, False
        return place._replace(begun=2 * byte), 1, False
    if len(place.begun) == 2:
        return _string_end(place, 0, tell)
    return place._replace(mode=Mode.STRING, begun=b""), 0, False


def _string_end(place: Place, taken: int, tell: Any) -> Step:
    tell((Act.FORMAT_END if place.formatted else Act.STRING_END, None))
    return Place(Mode.CODE, level=place.level), taken, False


def _string(language: Language, place: Place, byte: bytes, tell: Any) -> Step:
    """In a string, or in the format of one of its fields."""
    begun, plain = place.begun, place._replace(begun=b"")
    if begun == b"\\":
        if byte == b"\r":  # and a line feed belongs to it
            return place._replace(begun=b"\\\r"), 1, False
        named = byte == b"N" and place.formatted and not place.raw
        braces = byte in b"{}" and place.formatted  # no escape has those
        return place._replace(begun=b"\\N" if named else b""), 0 if braces else 1, False
    if begun == b"\\\r":
        return plain, int(byte == b"\n"), False
    if begun[:2] == b"\\N":  # \N{DASH} is no field
        if begun == b"\\N" and byte == b"{":
            return place._replace(begun=b"\\N{"), 1, False
        if begun == b"\\N{" and (byte.isalnum() or byte in b" -"):
            return place, 1, False
        return plain, int(begun == b"\\N{" and byte == b"}"), False
    if byte == place.quote[:1]:
        if begun + byte == place.quote:
            return _string_end(plain, 1, tell)
        return place._replace(begun=begun + byte), 1, False
    if byte == b"\\":
        return place._replace(begun=byte), 1, False
    if byte[0] in NEWLINE and len(place.quote) == 1:  # nobody closed it
        return _string_end(plain, 0, tell)
    if place.formatted and byte == b"{":
        tell((Act.FIELD, plain))
        return Place(Mode.FIELD, level=1), 1, False
    if place.mode is Mode.SPEC and byte == b"}":
        tell((Act.CLOSE, byte))
        return plain, 1, True
    return plain, 1, False


def _field(language: Language, place: Place, byte: bytes, tell: Any) -> Step:
    if byte == b"{":
        tell((Act.NO_FIELD, None))
        return place, 1, True
    return place._replace(mode=Mode.CODE), 0, False


_STEPS = {
    Mode.CODE: _code,
    Mode.LINE: _line,
    Mode.WORD: _word,
    Mode.CONTINUED: _continued,
    Mode.COMMENT: _comment,
    Mode.LONG_COMMENT: _long_comment,
    Mode.QUOTES: _quotes,
    Mode.STRING: _string,
    Mode.SPEC: _string,
    Mode.FIELD: _field,
}
