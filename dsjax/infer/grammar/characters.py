"""Which characters a text or a name may hold, also of those whose bytes have not all come; and how they are called."""

from __future__ import annotations

import bisect
import functools
import sys
import unicodedata

_CJK = "CJK UNIFIED IDEOGRAPH-"


def in_name(c: str) -> bool:
    """Whether a character may stand in a name."""
    return f"a{c}".isidentifier()


def begins_name(c: str) -> bool:
    """Whether a name may begin with a character."""
    return c.isidentifier()


@functools.cache
def _begun_names(first: bool) -> frozenset[bytes]:
    """The beginnings of the bytes of all characters beyond ASCII that a name may hold."""
    fits = begins_name if first else in_name
    found = (chr(code).encode() for code in range(0x80, sys.maxunicode + 1) if code >> 11 != 27 and fits(chr(code)))
    return frozenset(c[:n] for c in found for n in range(1, len(c)))


def may_be_name(begun: bytes, *, first: bool) -> bool:
    """Whether these are the first bytes, not all, of a character that a name may hold, or ``first`` may begin with."""
    return begun in _begun_names(first)


def may_be_text(begun: bytes) -> bool:
    """Whether these are the first bytes, not all, of some character beyond ASCII."""
    first, rest = begun[0], begun[1:]
    size = 2 if 0xC2 <= first < 0xE0 else 3 if 0xE0 <= first < 0xF0 else 4 if 0xF0 <= first < 0xF5 else 0
    if len(begun) >= size or any(byte >> 6 != 2 for byte in rest):
        return False
    low, high = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}.get(
        first, (0x80, 0xBF)
    )
    return not rest or low <= rest[0] <= high


@functools.cache
def _names() -> list[str]:
    """The names of all characters but the ideographs whose names are numbers, sorted."""
    found = (unicodedata.name(chr(code), "") for code in range(sys.maxunicode + 1))
    return sorted({name for name in found if name and not name.startswith(_CJK)})


def name_of_character(text: str, *, whole: bool) -> bool:
    """Whether some character is called so, in capitals, or its name begins so if it is not the ``whole``."""
    if not text:
        return not whole
    names = _names()
    at = bisect.bisect_left(names, text)
    if whole:
        return at < len(names) and names[at] == text
    return at < len(names) and names[at].startswith(text)


def first_name(begun: str) -> str:
    """The first character name that begins so."""
    names = _names()
    return names[bisect.bisect_left(names, begun)]
