"""Plain data as bytes: all that may pass between a judge and the program that it judges.

JSON carries None, booleans, strings, finite floats, lists and integers of 64 bits as they are. Whatever else is plain
is an object with one key, which says what it is: {"tuple": [1, 2]}, {"int": "-1f..."}, {"dict": [[key, value], ...]}.
So a JSON object is never a dict of Python's, and nothing can pretend to be something else.

Types count exactly: an object of a subclass may lie about what it equals. Of Python's own types beyond the plain ones
fractions, decimals, views of dicts and those of ``collections`` travel too (a defaultdict as a dict). Iterators, which
sending uses up, travel where ``other`` is given, as iterators over what they would have given; so do the values of a
dict, which equal nothing but themselves. NaN is one object wherever it arrives, so a list of it equals another.

This file is read by the program's process too, and imports nothing of ours.
"""

from __future__ import annotations

import collections
import decimal
import fractions
import json
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

WORD = 2**63
MOST_NESTED = 150  # below where Python's own recursion ends, in both processes
HEADER = 8  # bytes in front of a message that hold its length


class NotPlain(TypeError):
    """Something that can not travel; the message says of what type it is."""


class Malformed(ValueError):
    """Bytes that no ``pack`` has made."""


def pack(x: Any, other: Callable[[Any], Any] | None = None) -> bytes:
    """A message: its length in ``HEADER`` bytes, then ``x``. ``other`` gives the JSON for what is not plain."""
    text = json.dumps(encode(x, other), separators=(",", ":")).encode("ascii")
    return len(text).to_bytes(HEADER, "big") + text


def unpack(body: bytes, other: Callable[[str, Any], Any] | None = None) -> Any:
    """What ``pack`` was given, from its bytes without the header. The bytes may be anybody's: raises ``Malformed``."""
    try:
        return decode(json.loads(body), other)
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError, MemoryError) as error:
        raise Malformed(f"{type(error).__name__}: {error}"[:200]) from None


def encode(x: Any, other: Callable[[Any], Any] | None = None, depth: int = 0) -> Any:
    """``x`` as JSON has it. Raises ``NotPlain`` for what is not plain data, unless ``other`` says something instead.

    ``depth`` is the number of containers around it.
    """
    kind = type(x)
    if x is None or kind is bool:
        return x
    if kind is int:
        return x if -WORD <= x < WORD else {"int": f"{x:x}"}
    if kind is float:
        return x if math.isfinite(x) else {"float": repr(x)}
    if kind is str:
        return x if x.isascii() or _has_no_surrogates(x) else {"str": x.encode("utf-8", "surrogatepass").hex()}
    if kind is bytes or kind is bytearray:
        return {kind.__name__: x.hex()}
    if kind is complex:
        return {"complex": [encode(x.real), encode(x.imag)]}
    if kind is decimal.Decimal:
        return {"Decimal": str(x)}
    if kind is fractions.Fraction:
        return {"Fraction": [encode(x.numerator), encode(x.denominator)]}
    if kind is range:
        return {"range": [encode(x.start), encode(x.stop), encode(x.step)]}
    if depth == MOST_NESTED:
        raise NotPlain(f"nested more than {MOST_NESTED} deep")
    if other is None and (kind is _VALUES or hasattr(kind, "__next__")):
        raise NotPlain(f"{kind.__name__} is not plain data")
    if kind is list or kind in _SEQUENCES:
        items = list(x) if _all_simple(x) else [encode(item, other, depth + 1) for item in x]
        return items if kind is list else {_SEQUENCES[kind]: items}
    if kind in _MAPPINGS:
        return {_MAPPINGS[kind]: [[encode(k, other, depth + 1), encode(v, other, depth + 1)] for k, v in x.items()]}
    if hasattr(kind, "__next__"):
        return {"iterator": [encode(item, other, depth + 1) for item in x]}
    if other is None:
        raise NotPlain(f"{kind.__name__} is not plain data")
    return other(x)


def decode(x: Any, other: Callable[[str, Any], Any] | None = None) -> Any:
    """The inverse of ``encode``, of anybody's JSON; ``other`` gets the keys that are not known here."""
    if type(x) is list:
        return x if _NESTED.isdisjoint(map(type, x)) else [decode(item, other) for item in x]
    if type(x) is not dict:
        return x
    ((kind, body),) = x.items()
    if kind in _MAKE_SEQUENCE:
        return _MAKE_SEQUENCE[kind](decode(item, other) for item in _list(body))
    if kind in _MAKE_MAPPING:
        return _MAKE_MAPPING[kind]({decode(k, other): decode(v, other) for k, v in map(_list, _list(body))})
    if kind in _MAKE_SCALAR:
        return _MAKE_SCALAR[kind](body)
    if other is None:
        raise Malformed(f"no kind of data is called {kind[:20]!r}")
    return other(kind, body)


def _all_simple(items: Collection[Any]) -> bool:
    """Whether all items are of one type and need no change; long lists of numbers are worth it."""
    kinds = set(map(type, items))
    if kinds == {int}:
        return min(items) >= -WORD and max(items) < WORD
    return (kinds == {float} and all(map(math.isfinite, items))) or (kinds == {str} and all(map(str.isascii, items)))


def _has_no_surrogates(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _list(x: Any) -> list[Any]:
    if type(x) is not list:
        raise Malformed(f"a list was due, not a {type(x).__name__}")
    return x


def _one_nan(x: Any) -> Any:
    """``x``; of NaN, which equals nothing, one object for each way to write it, as which containers find it equal."""
    text = repr(x)
    return _NANS.setdefault(text, x) if "nan" in text.lower() else x


_NANS: dict[str, Any] = {}
_NESTED = {list, dict}
_VALUES: type = type({}.values())
_SEQUENCES: dict[type, str] = {
    **{tuple: "tuple", set: "set", frozenset: "frozenset", collections.deque: "deque"},
    **{type({}.keys()): "keys", _VALUES: "values", type({}.items()): "items"},
}
_MAPPINGS: dict[type, str] = {
    dict: "dict",
    collections.defaultdict: "dict",  # what makes its missing items is a function
    collections.Counter: "Counter",
    collections.OrderedDict: "OrderedDict",
}
_MAKE_SEQUENCE: dict[str, Callable[[Iterable[Any]], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
    "keys": lambda items: dict.fromkeys(items).keys(),
    "values": lambda items: dict(enumerate(items)).values(),
    "items": lambda items: dict(items).items(),
    "iterator": lambda items: iter(list(items)),
}
_MAKE_MAPPING: dict[str, Callable[[dict[Any, Any]], Any]] = {
    "dict": dict,
    "Counter": collections.Counter,
    "OrderedDict": collections.OrderedDict,
}
_MAKE_SCALAR: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "float": lambda text: _one_nan(float(text)),
    "str": lambda text: bytes.fromhex(text).decode("utf-8", "surrogatepass"),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "Decimal": lambda text: _one_nan(decimal.Decimal(_string(text))),
    "Fraction": lambda parts: fractions.Fraction(*(decode(part) for part in _list(parts))),
    "complex": lambda parts: _one_nan(complex(*(_number(decode(part)) for part in _list(parts)))),
    "range": lambda parts: range(*(decode(part) for part in _list(parts))),
}


def _number(x: Any) -> float:
    if type(x) not in (int, float):
        raise Malformed(f"a number was due, not a {type(x).__name__}")
    return x


def _string(x: Any) -> str:
    if type(x) is not str:
        raise Malformed(f"a string was due, not a {type(x).__name__}")
    return x
