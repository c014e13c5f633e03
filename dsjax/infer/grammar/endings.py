"""What has been begun may become: the tokens of an unfinished one, and the shortest way to the end of a text."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from dsjax.infer.grammar.characters import first_name
from dsjax.infer.grammar.lexer import Lex, operator_tokens
from dsjax.infer.grammar.python_syntax import OPERATORS, SPELLINGS, WORDS
from dsjax.infer.grammar.spellings import BEGUN_OPERATORS, NEVER_IMAGINARY, NUMBERS, PREFIXES, number_token

NOTHING: tuple[tuple[str, ...], ...] = ((),)


@functools.cache
def pending(state: Lex) -> tuple[tuple[str, ...], ...]:
    """The tokens that what is begun may become, by all ways; ``((),)``: nothing is begun that has to become one."""
    if state.mode == "name":
        return tuple((token,) for token in _words(state))
    if state.mode == "wide":
        assert state.base is not None
        return (("NAME",),) if state.base.mode in ("name", "first_letter") else pending(state.base)
    if state.mode == "comment" and state.base is None and not state.inside.bracket:
        return (("NEWLINE",),)  # nothing else ends it
    if state.mode == "number":
        if state.text == "imag":
            return (("IMAG",),)
        return (("REAL",),) if state.text in NEVER_IMAGINARY else (("REAL",), ("IMAG",))
    if state.mode == "operator":
        return tuple(_operators(state))
    if state.mode == "cr":
        assert state.base is not None
        moved = state.base.step(10)
        return (tuple(event for event in moved[0] if isinstance(event, str)),) if moved else ()
    return NOTHING


def _words(state: Lex) -> dict[str, None]:
    found = {"NAME": None}
    if state.text:
        found |= {token: None for word, token in WORDS.items() if word.startswith(state.text)}
        if state.inside.room_for("'") or state.inside.room_for('"'):
            text = state.text.lower()
            found |= {kind: None for prefix, (_, kind) in PREFIXES.items() if prefix.startswith(text)}
    return found


def _operators(state: Lex) -> Iterator[tuple[str, ...]]:
    text, field = state.text, state.inside.is_field
    if text in (".", ".."):
        yield from ((".",), ("...",), ("REAL",), ("IMAG",)) if text == "." else (("...",), (".", "."))
        return
    yield from {operator_tokens(state.inside, op): None for op in OPERATORS if op.startswith(text)}
    if text == "!" and field:
        yield ("CONV",)


def completions(state: Lex) -> Iterator[str]:
    """Texts that complete what is begun, the likely short ones first; some may not fit what is around."""
    mode, text, quote = state.mode, state.text, state.quote
    if mode == "name":
        yield ""
        yield from sorted((w[len(text) :] for w in WORDS if text and w.startswith(text)), key=len)
        yield from (f"{x}{mark}y{mark}" for x in ("", "b", "r", "f") for mark in "'\"" if text)
        yield "x"
    elif mode == "number":
        yield from ("", "0", "j", "0j", ".", ".0j") if number_token(text) or text in NUMBERS else ()
    elif mode == "operator":
        yield from sorted((op[len(text) :] for op in BEGUN_OPERATORS if op.startswith(text)), key=len)
        yield from ("0", "0j", "r")
    elif mode in ("comment", "backslash"):
        yield "\n"
    elif mode == "cr":
        assert state.base is not None
        moved = state.base.step(10)
        yield from ("\n" + rest for rest in completions(moved[1])) if moved and moved[1] else ()
    elif mode in ("open", "open2", "str", "escape", "raw", "digits", "octal", "called") and quote is not None:
        begun = {"escape": "n", "raw": "n", "digits": text.replace("x", "0").replace("?", "0").replace("4", "0")}
        if mode == "called":
            begun["called"] = _rest_of_name(text)
        closing = quote.mark * (3 - (len(text) if mode == "str" else 0) if quote.triple else 1)
        within = quote.kind == "FSTRING" and mode not in ("open", "open2")
        if within:
            yield begun.get(mode, "x" if text else "")  # no quotes in front of those that end it
        else:
            yield begun.get(mode, "") + ("" if mode == "open2" else closing)
        yield "x" + closing
    elif mode == "brace":
        yield text
    elif mode == "wide":
        yield from _bytes_of_rest(state)
    else:
        yield ""


def _rest_of_name(text: str) -> str:
    """What makes it the name of a character."""
    return ("{" if not text else "") + first_name(text[1:])[len(text[1:]) :] + "}"


def _bytes_of_rest(state: Lex) -> Iterator[str]:
    """Bytes, as surrogate escapes, that make a character whole, and what completes what is behind it."""
    for byte in range(0x80, 0xC0):
        moved = state.step(byte)
        if moved is not None and moved[1] is not None:
            for rest in completions(moved[1]):
                yield bytes([byte]).decode(errors="surrogateescape") + rest


def spelling(token: str) -> str:
    """The shortest spelling of a token."""
    return SPELLINGS.get(token, token)
