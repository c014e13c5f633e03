"""Python's tokens, byte by byte: an automaton whose states tell what has been begun and not ended.

It takes what the tokenizers of Python 3.11 to 3.13 all take without a warning: of f-strings what 3.11 takes (no
backslash, comment or quote of the outer string inside a field), no unknown escapes, no ``1if``, no ``\\r`` alone.

A byte gives events: tokens that are complete, by their names in :mod:`dsjax.infer.grammar.python_syntax`, and what
happens to brackets and lines. Where the automaton is depends on the brackets that are open, of which it knows the last
one only: where that closes, :data:`POP`, the reader goes on in the state of what is around it. Indentation is the
reader's, too: the automaton tells the blanks at the beginning of a line, and then that something stands there.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Final, Literal, no_type_check

from dsjax.infer.grammar.characters import begins_name, in_name, may_be_name, may_be_text, name_of_character
from dsjax.infer.grammar.python_syntax import OPERATORS, WORDS
from dsjax.infer.grammar.spellings import (
    BEGUN_OPERATORS,
    BEGUN_WORDS,
    DIGITS,
    EXTENDED,
    HEX,
    NUMBERS,
    PREFIXES,
    number_token,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Blank:
    """An event: a blank at the beginning of a line; None: the line begins anew."""

    text: str | None


@dataclasses.dataclass(frozen=True, eq=False)
class Mark:
    """An event: ``POP``: a bracket or f-string closed; ``LINE``: a line that is not blank begins."""

    name: str


POP: Final = Mark("POP")
LINE: Final = Mark("LINE")
AGAIN: Final = Blank(None)
BLANKS: Final = {c: Blank(c) for c in " \t"}


@dataclasses.dataclass(frozen=True)
class Quote:
    """A string literal.

    Attributes:
        mark: its quote.
        triple: whether it takes three of them.
        raw: whether a backslash stands for itself.
        kind: of its token.
        outside: the brackets around it.
    """

    mark: str
    triple: bool
    raw: bool
    kind: Literal["TEXT", "BYTES", "FSTRING"]
    outside: Inside

    @functools.cached_property
    def hash(self) -> int:
        return hash((self.mark, self.triple, self.raw, self.kind, self.outside))

    def __hash__(self) -> int:
        return self.hash


@dataclasses.dataclass(frozen=True)
class Inside:
    """What is open around a token. As an event: a bracket or an f-string opens, and this is around it.

    Attributes:
        bracket: whether a bracket is; then a line's end is a blank.
        quote: the f-string whose field it is in.
        spec: whether that field is in the format of another one.
    """

    bracket: bool = False
    quote: Quote | None = None
    spec: bool = False

    @property
    def is_field(self) -> bool:
        """Directly in a field of an f-string: a colon begins its format."""
        return self.quote is not None and not self.bracket

    @functools.cached_property
    def lines(self) -> bool:
        """Whether a line may end here."""
        quote = self.quote
        return quote is None or (quote.triple and quote.outside.lines)

    def room_for(self, mark: str) -> int:
        """Whether a string with this quote may stand here: 2: yes; 1: but not an empty or triple one; 0: no."""
        if self.quote is None:
            return 2
        around = self.quote.outside.room_for(mark)
        return around if mark != self.quote.mark else min(around, 1) if self.quote.triple else 0

    @functools.cached_property
    def hash(self) -> int:
        return hash((self.bracket, self.quote, self.spec))

    def __hash__(self) -> int:
        return self.hash


Event = str | Inside | Blank | Mark
OUTSIDE: Final = Inside()


@no_type_check  # tests would check each call, and take ten times as long
class Lex:
    """A state of the automaton. There is one object of each: see :func:`lex`.

    Attributes:
        mode: what has been begun.
        inside: the brackets around it.
        text: how far.
        quote: the string literal that it is in.
        base: the state behind a character of which some bytes are still to come.
        steps: what bytes make of it, as far as known.
    """

    __slots__ = ("base", "inside", "mode", "quote", "steps", "text", "__weakref__")  # noqa: RUF023

    def __init__(self, mode: str, inside: Inside, text: str, quote: Quote | None, base: Lex | None):
        self.mode, self.inside, self.text, self.quote, self.base = mode, inside, text, quote, base
        self.steps: dict[int, Step] = {}

    def __repr__(self) -> str:
        return f"Lex({self.mode}, {self.text!r})"

    def step(self, byte: int) -> Step:
        """What comes of a byte: events, and the next state (None: of what is around, behind POP); None: refused."""
        try:
            return self.steps[byte]
        except KeyError:
            found = self.steps[byte] = _step(self, byte)
            return found


Step = tuple[tuple[Event, ...], Lex | None] | None


@functools.cache
def lex(
    mode: str, inside: Inside = OUTSIDE, text: str = "", quote: Quote | None = None, base: Lex | None = None
) -> Lex:
    """The state of that kind."""
    return Lex(mode, inside, text, quote, base)


START: Final = lex("bol")
FRONT: Final = lex("front")  # in front of a text whose first blank does not count


def between(inside: Inside) -> Lex:
    """The state between two tokens."""
    return lex("mid", inside)


def _step(state: Lex, byte: int) -> Step:
    if state.mode == "wide":
        return _wide(state, byte)
    if byte >= 0x80:
        return _wide_begins(state, byte)
    c = chr(byte)
    if state.mode == "cr":
        assert state.base is not None
        return state.base.step(byte) if c == "\n" else None
    if c == "\r":
        return None if state.step(10) is None else ((), lex("cr", state.inside, base=state))
    return None if c == "\0" else _MODES[state.mode](state, c)


# ------------------------------------------------------------ between strings


def _code(inside: Inside, c: str) -> Step:
    """A character behind a complete token."""
    if c in " \t\f":
        return (), between(inside)
    if c == "\n":
        if inside == OUTSIDE:
            return ("NEWLINE", AGAIN), START
        return ((), between(inside)) if inside.lines else None
    if c == "#" or c == "\\":
        return None if inside.quote else ((), lex("comment" if c == "#" else "backslash", inside))
    if c.isalpha() or c == "_":
        return (), lex("name", inside, c if c in BEGUN_WORDS else "")
    if c.isdigit():
        return (), lex("number", inside, "zero" if c == "0" else "int")
    if c in "'\"":
        return _opened(inside, "", c)
    if inside.is_field and c in ":}":
        return _field_part(inside, c)
    return _operator(inside, c) if c in BEGUN_OPERATORS else None


def _field_part(inside: Inside, c: str) -> Step:
    """The end of what a field shows: its format, or the end of all of it."""
    quote = inside.quote
    if c == ":":
        return ("SPEC",), lex("spec", inside, quote=quote)
    if inside.spec:
        return ("FIELD_END",), lex("spec", Inside(quote=quote), quote=quote)
    return ("FIELD_END",), lex("str", quote=quote)


def _operator(inside: Inside, text: str) -> Step:
    if text in EXTENDED:
        return (), lex("operator", inside, text)
    token = OPERATORS[text]
    if token in "([{":
        return (token, inside), between(Inside(True, inside.quote, inside.spec))
    if token in ")]}":
        return (token, POP), None
    return (token,), between(inside)


def _then(events: tuple[Event, ...], more: Step) -> Step:
    return None if more is None else (events + more[0], more[1])


def _mid(state: Lex, c: str) -> Step:
    return _code(state.inside, c)


def _bol(state: Lex, c: str) -> Step:
    if c in " \t":
        return (BLANKS[c],), START
    if c in "\f\n":
        return (AGAIN,), START
    if c == "\\":
        return None
    return ((), lex("comment", base=START)) if c == "#" else _then((LINE,), _code(OUTSIDE, c))


def _front(state: Lex, c: str) -> Step:
    return ((), START) if c == " " else START.step(ord(c))


def _comment(state: Lex, c: str) -> Step:
    if c != "\n":
        return (), state
    return ((AGAIN,), START) if state.base else _code(state.inside, c)


def _backslash(state: Lex, c: str) -> Step:
    return ((), lex("continued", state.inside)) if c == "\n" else None


def _name(state: Lex, c: str) -> Step:
    if c.isalnum() or c == "_":
        text = state.text + c
        return (), lex("name", state.inside, text if state.text and text in BEGUN_WORDS else "")
    if c in "'\"" and state.text and state.text.lower() in PREFIXES:
        return _opened(state.inside, state.text.lower(), c)
    return _then((WORDS.get(state.text, "NAME"),), _code(state.inside, c))


def _number(state: Lex, c: str) -> Step:
    for characters, target in NUMBERS[state.text].items():
        if c in characters:
            return (), lex("number", state.inside, target)
    if c.isalnum() or c == "_" or not (ended := number_token(state.text)):
        return None
    return _then((ended,), _code(state.inside, c))


def _operator_goes_on(state: Lex, c: str) -> Step:
    inside, text = state.inside, state.text
    if text + c in BEGUN_OPERATORS:
        return _operator(inside, text + c)
    if text[0] == "." and c.isdigit():
        return (".",) * (len(text) - 1), lex("number", inside, "frac")
    if text == "!":
        return (("CONV",), lex("converted", inside)) if inside.is_field and c in "rsa" else None
    return _then(operator_tokens(inside, text), _code(inside, c))


def operator_tokens(inside: Inside, text: str) -> tuple[str, ...]:
    """The tokens of an operator that ends there; none if it can not."""
    if text == "..":
        return (".", ".")
    if text == "=" and inside.is_field and not inside.spec:  # in a format, Python 3.12.1 fails to parse it
        return ("DEBUG",)
    return (OPERATORS[text],) if text in OPERATORS else ()


def _converted(state: Lex, c: str) -> Step:
    return _field_part(state.inside, c) if c in ":}" else None


# ------------------------------------------------------------ strings


def _opened(inside: Inside, prefix: str, mark: str) -> Step:
    """The first quote of a string."""
    if not inside.room_for(mark):
        return None
    raw, kind = PREFIXES[prefix]
    return (kind,), lex("open", inside, quote=Quote(mark, False, raw, kind, inside))  # type: ignore[arg-type]


def _open(state: Lex, c: str) -> Step:
    """Behind the first quote."""
    quote = state.quote
    assert quote is not None
    if c == quote.mark:
        return ((), lex("open2", state.inside, quote=quote)) if state.inside.room_for(c) == 2 else None
    return _content(state.inside, quote, c)


def _open2(state: Lex, c: str) -> Step:
    """Behind the second quote: an empty string, unless there is a third."""
    quote = state.quote
    assert quote is not None
    if c == quote.mark:
        triple = dataclasses.replace(quote, triple=True)
        if quote.kind == "FSTRING":
            return (state.inside,), lex("str", quote=triple)
        return (), lex("str", state.inside, quote=triple)
    return _then(("FSTRING_END",) if quote.kind == "FSTRING" else (), _code(state.inside, c))


def _content(inside: Inside, quote: Quote, c: str) -> Step:
    if quote.kind == "FSTRING":
        return _then((inside,), _str(lex("str", quote=quote), c))
    return _str(lex("str", inside, quote=quote), c)


def _str(state: Lex, c: str) -> Step:
    """Within a string; ``text`` holds quotes that came last, and ``inside`` means something if it is no f-string."""
    quote = state.quote
    assert quote is not None
    on = lex("str", state.inside, quote=quote)
    if c == quote.mark:
        if quote.triple and len(state.text) < 2:
            return (), lex("str", state.inside, state.text + c, quote)
        return (("FSTRING_END", POP), None) if quote.kind == "FSTRING" else ((), between(state.inside))
    if c == "\n":
        return ((), on) if quote.triple and quote.outside.lines else None
    if c in "'\"" and (room := quote.outside.room_for(c)) < 2:  # of an f-string around it: never three in a row
        alone = room == 1 and not quote.triple and state.text != c
        return ((), lex("str", state.inside, c, quote)) if alone else None
    if c == "\\":
        return None if quote.outside.quote else ((), lex("raw" if quote.raw else "escape", state.inside, quote=quote))
    if quote.kind == "FSTRING" and c in "{}":
        return (), lex("brace", state.inside, c, quote)
    return (), on


def _brace(state: Lex, c: str) -> Step:
    """Behind a brace in an f-string: two stand for one, and one begins a field."""
    if c == state.text:
        return (), lex("str", state.inside, quote=state.quote)
    return None if state.text == "}" else _then(("FIELD",), _code(Inside(quote=state.quote), c))


def _spec(state: Lex, c: str) -> Step:
    """In the format of a field."""
    quote, inside = state.quote, state.inside
    assert quote is not None
    if c == "}":
        return _field_part(inside, c)
    if c == "{":
        return None if inside.spec else (("FIELD",), lex("first", Inside(quote=quote, spec=True)))
    return None if c in "\\\n" or c == quote.mark or quote.outside.room_for(c) < 2 else ((), state)


def _first(state: Lex, c: str) -> Step:
    """Behind the brace of a field in a format: Python 3.12 takes two of them for something else."""
    return None if c == "{" else _code(state.inside, c)


def _raw(state: Lex, c: str) -> Step:
    """Behind a backslash that stands for itself: a quote does not end the string."""
    on = lex("str", state.inside, quote=state.quote)
    return _str(on, c) if c in "{}" else ((), on)


def _escape(state: Lex, c: str) -> Step:
    """Behind a backslash; then ``text`` tells which characters may follow: each of its parts takes one."""
    quote = state.quote
    assert quote is not None
    if c in "\n\\'\"abfnrtv":
        return (), lex("str", state.inside, quote=quote)
    if c in "01234567":
        return (), lex("octal", state.inside, "xx" if c in "0123" else "x!", quote)
    if quote.kind != "BYTES" and c == "N":
        return (), lex("called", state.inside, "", quote)
    digits = {"x": "xx", "u": "xxxx", "U": "00?xxxxx"} if quote.kind != "BYTES" else {"x": "xx"}
    return ((), lex("digits", state.inside, digits[c], quote)) if c in digits else None


def _digits(state: Lex, c: str) -> Step:
    """Digits of a character: up to 10ffff."""
    at, rest = state.text[0], state.text[1:]
    if c not in {"0": "0", "?": "01", "4": "0"}.get(at, HEX):
        return None
    if at == "?" and c == "1":
        rest = "4xxxx"
    return (), lex("digits" if rest else "str", state.inside, rest, state.quote)


def _octal(state: Lex, c: str) -> Step:
    """Up to three digits. Behind 4 to 7, a third one would make more than a byte holds: it is refused."""
    if c in DIGITS[:8]:
        rest = state.text[1:]
        return None if state.text == "!" else ((), lex("octal" if rest else "str", state.inside, rest, state.quote))
    return _str(lex("str", state.inside, quote=state.quote), c)


def _called(state: Lex, c: str) -> Step:
    """A character by its name, from the brace on."""
    text = state.text + c.upper()
    if text[0] != "{":
        return None
    if c == "}":
        on = lex("str", state.inside, quote=state.quote)
        return ((), on) if name_of_character(text[1:-1], whole=True) else None
    return ((), lex("called", state.inside, text, state.quote)) if name_of_character(text[1:], whole=False) else None


# ------------------------------------------------------------ beyond ASCII


def _wide_begins(state: Lex, byte: int) -> Step:
    """The first byte of a character beyond ASCII: text, or part of a name."""
    if state.mode in ("str", "open", "raw", "spec", "octal", "comment"):
        if state.quote is not None and state.quote.kind == "BYTES":
            return None
        then = _step(state, 1)  # as any character that means nothing
        if then is None or then[1] is None or not may_be_text(bytes([byte])):
            return None
        text = then[1]
        return then[0], lex("wide", text.inside, chr(byte), text.quote, text)
    if state.mode == "name":
        if not may_be_name(bytes([byte]), first=False):
            return None
        return (), lex("wide", state.inside, chr(byte), base=lex("name", state.inside))
    letter = _step(state, ord("x"))  # ends what was begun
    if letter is None or letter[1] is None or letter[1].mode != "name" or not may_be_name(bytes([byte]), first=True):
        return None
    inside = letter[1].inside
    return letter[0], lex("wide", inside, chr(byte), base=lex("first_letter", inside))


def _wide(state: Lex, byte: int) -> Step:
    """A further byte of a character."""
    text, base = (state.text + chr(byte)).encode("latin-1"), state.base
    assert base is not None
    names = base.mode in ("name", "first_letter")
    try:
        c = text.decode()
    except UnicodeDecodeError:
        fits = may_be_name(text, first=base.mode == "first_letter") if names else may_be_text(text)
        return ((), lex("wide", state.inside, text.decode("latin-1"), state.quote, base)) if fits else None
    if not names:
        return (), base
    fits = begins_name(c) if base.mode == "first_letter" else in_name(c)
    return ((), lex("name", state.inside)) if fits else None


_MODES = {
    "bol": _bol, "mid": _mid, "continued": _mid, "comment": _comment, "backslash": _backslash, "name": _name,
    "number": _number, "operator": _operator_goes_on, "converted": _converted, "open": _open, "open2": _open2,
    "str": _str, "brace": _brace, "spec": _spec, "first": _first, "raw": _raw, "escape": _escape, "digits": _digits,
    "octal": _octal, "called": _called, "front": _front,
}  # fmt: skip
