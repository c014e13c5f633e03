"""How words, operators, strings and numbers begin and go on."""

from __future__ import annotations

from dsjax.infer.grammar.python_syntax import OPERATORS, WORDS

# A string's prefix -> whether a backslash stands for itself, and its token.
PREFIXES = {
    "": (False, "TEXT"),
    "u": (False, "TEXT"),
    "r": (True, "TEXT"),
    "b": (False, "BYTES"),
    "br": (True, "BYTES"),
}
PREFIXES |= {"rb": (True, "BYTES"), "f": (False, "FSTRING"), "fr": (True, "FSTRING"), "rf": (True, "FSTRING")}
# Beginnings of words that mean something, in each case that does.
_SPELT = {p for prefix in PREFIXES for p in (prefix, prefix.upper(), prefix.title(), prefix[:1] + prefix[1:].upper())}
BEGUN_WORDS = {word[:n] for word in (*WORDS, *_SPELT) for n in range(1, len(word) + 1)}
BEGUN_OPERATORS = {op[:n] for op in OPERATORS for n in range(1, len(op) + 1)}
EXTENDED = {begun for begun in BEGUN_OPERATORS for op in OPERATORS if op.startswith(begun) and op != begun}

DIGITS, HEX = "0123456789", "0123456789abcdefABCDEF"
# Numbers: state -> characters that go on, and where; those of REALS and IMAGINARY may end.
NUMBERS: dict[str, dict[str, str]] = {
    "zero": {"0": "zeros", "123456789": "lead", "_": "zero_", ".": "point", "eE": "e", "jJ": "imag", "xX": "x",
             "oO": "o", "bB": "b"},
    "zeros": {"0": "zeros", "123456789": "lead", "_": "zero_", ".": "point", "eE": "e", "jJ": "imag"},
    "zero_": {"0": "zeros", "123456789": "lead"},
    "lead": {DIGITS: "lead", "_": "lead_", ".": "point", "eE": "e", "jJ": "imag"},  # 09: only of a float
    "lead_": {DIGITS: "lead"},
    "int": {DIGITS: "int", "_": "int_", ".": "point", "eE": "e", "jJ": "imag"},
    "int_": {DIGITS: "int"},
    "point": {DIGITS: "frac", "eE": "e", "jJ": "imag"},
    "frac": {DIGITS: "frac", "_": "frac_", "eE": "e", "jJ": "imag"},
    "frac_": {DIGITS: "frac"},
    "e": {DIGITS: "exp", "+-": "sign"},
    "sign": {DIGITS: "exp"},
    "exp": {DIGITS: "exp", "_": "exp_", "jJ": "imag"},
    "exp_": {DIGITS: "exp"},
    "imag": {},
    "x": {HEX: "hex", "_": "x_"}, "x_": {HEX: "hex"}, "hex": {HEX: "hex", "_": "x_"},
    "o": {"01234567": "oct", "_": "o_"}, "o_": {"01234567": "oct"}, "oct": {"01234567": "oct", "_": "o_"},
    "b": {"01": "bin", "_": "b_"}, "b_": {"01": "bin"}, "bin": {"01": "bin", "_": "b_"},
}  # fmt: skip
REALS = {"zero", "zeros", "int", "point", "frac", "exp", "hex", "oct", "bin"}
ENDLESS = {"int", "int_", "lead", "lead_", "zero", "zeros", "zero_"}  # Python reads 4300 digits of a whole number
NEVER_IMAGINARY = {"x", "x_", "hex", "o", "o_", "oct", "b", "b_", "bin"}


def number_token(text: str) -> str:
    """The token of a number in that state; empty: it can not end there."""
    return "IMAG" if text == "imag" else "REAL" if text in REALS else ""
