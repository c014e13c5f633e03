"""What a scanner must know of a language, as a table of data."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Mapping

from dsjax.nn.fields import LEAF


class Binds(enum.Enum):
    """Which names that come are bound."""

    NOT = enum.auto()
    NEXT = enum.auto()
    ALL = enum.auto()


@dataclasses.dataclass(frozen=True)
class Language:
    """A language whose blocks are told by indentation behind a colon, or by braces.

    Attributes:
        name: of the language.
        indentation: blocks are told by it; else by braces, and statements end at semicolons.
        words: leaf of each word that is no name.
        statements: kind of the statement that begins with a word.
        signs: leaf of each sign of more than one character, and of those that are not an operator like any other.
        headers: kinds of statements that open a block.
        clauses: kinds of statements that belong to the one before them.
        binds: what words say of the names behind them.
        never_in_brackets: words that prove that open brackets were never closed.
        loops: kinds of blocks that can be left by `break`.
        labels: kinds of statements that end at a colon, in a language with braces.
        line_comment: begins a comment up to the end of the line.
        block_comment: begins and ends one; none: there is no such.
        directive: begins a statement up to the end of the line, where it is the first in it; none: there is no such.
        quotes: each begins and ends a string.
        long_quotes: whether three quotes begin a string of several lines.
        prefixes: words that a string may have directly in front, in lower case.
        formatted: letters in a prefix that say that a string has fields in braces; raw: that it has no escapes.
    """

    name: str
    indentation: bool
    words: Mapping[bytes, str]
    statements: Mapping[bytes, str]
    signs: Mapping[bytes, str]
    headers: frozenset[str]
    clauses: frozenset[str]
    loops: frozenset[str]
    binds: Mapping[bytes, Binds]
    never_in_brackets: frozenset[bytes] = frozenset()
    labels: frozenset[str] = frozenset()
    line_comment: bytes = b"#"
    block_comment: tuple[bytes, bytes] | None = None
    directive: bytes | None = None
    quotes: bytes = b"\"'"
    long_quotes: bool = False
    prefixes: frozenset[bytes] = frozenset()
    formatted: bytes = b""
    raw: bytes = b""

    @functools.cached_property
    def beginnings(self) -> frozenset[bytes]:
        """What signs begin with, themselves included: while it matches, a sign is read on."""
        comments = {self.line_comment, *(self.block_comment or ())[:1]}
        return frozenset(sign[:n] for sign in {*self.signs, *comments} for n in range(1, len(sign) + 1))

    @functools.cached_property
    def leaves(self) -> Mapping[bytes, int]:
        """Number of the leaf of each word that is no name."""
        return {word: LEAF[name] for word, name in self.words.items()}

    @functools.cached_property
    def prefix_beginnings(self) -> frozenset[bytes]:
        """What prefixes of strings begin with, themselves included."""
        return frozenset(prefix[:n] for prefix in self.prefixes for n in range(1, len(prefix) + 1))

    def __hash__(self) -> int:
        return hash(self.name)


def _same(*words: str) -> dict[bytes, str]:
    return {word.encode(): word for word in words}


_SIGNS = {
    **_same(".", "=", "*"),
    **dict.fromkeys((b"+", b"-", b"~"), "sign"),
    **dict.fromkeys((b"/", b"%", b"&", b"|", b"^", b"<<", b">>"), "operator"),
    **dict.fromkeys((b"==", b"!=", b"<", b">", b"<=", b">="), "compare"),
    **dict.fromkeys((b"+=", b"-=", b"*=", b"/=", b"%=", b"&=", b"|=", b"^=", b"<<=", b">>="), "augmented"),
}

PYTHON = Language(
    name="python",
    indentation=True,
    words=_same(
        "and", "as", "assert", "async", "await", "break", "class", "continue", "def", "del", "elif", "else", "except",
        "False", "finally", "for", "from", "global", "if", "import", "in", "is", "lambda", "None", "nonlocal", "not",
        "or", "pass", "raise", "return", "True", "try", "while", "with", "yield",
    ),
    statements=_same(
        "class", "def", "if", "elif", "else", "for", "while", "with", "try", "except", "finally", "match", "case",
        "return", "yield", "import", "from", "raise", "assert", "del", "global", "nonlocal", "pass", "break",
        "continue", "type",
    ),
    signs={
        **_SIGNS,
        **_same(":", ":=", "->", "@", "**", "...", ),
        **dict.fromkeys((b"//",), "operator"),
        **dict.fromkeys((b"//=", b"**=", b"@="), "augmented"),
    },
    headers=frozenset((
        "class", "def", "async_def", "if", "elif", "else", "for", "while", "with", "try", "except", "finally", "match",
        "case",
    )),
    clauses=frozenset(("elif", "else", "except", "finally")),
    loops=frozenset(("for", "while")),
    binds={b"for": Binds.ALL, b"in": Binds.NOT, **dict.fromkeys((b"as", b"class", b"def", b"import"), Binds.NEXT)},
    never_in_brackets=frozenset((
        b"assert", b"break", b"class", b"continue", b"def", b"del", b"elif", b"except", b"finally", b"global",
        b"import", b"nonlocal", b"pass", b"raise", b"return", b"try", b"while", b"with",
    )),
    long_quotes=True,
    prefixes=frozenset((b"b", b"u", b"r", b"f", b"t", b"br", b"rb", b"fr", b"rf", b"tr", b"rt")),
    formatted=b"ft",
    raw=b"r",
)  # fmt: skip

C = Language(
    name="c",
    indentation=False,
    words={
        **_same("break", "case", "continue", "else", "for", "if", "return", "while"),
        **dict.fromkeys(
            b"auto char const default do double enum extern float goto inline int long register restrict short signed"
            b" sizeof static struct switch typedef union unsigned void volatile".split(),
            "keyword",
        ),
    },
    statements={
        **_same("break", "case", "continue", "do", "else", "for", "goto", "if", "return", "switch", "typedef", "while"),
        b"default": "case",
        **dict.fromkeys((b"struct", b"union", b"enum"), "class"),
    },
    signs={**_SIGNS, **_same("->", "..."), **dict.fromkeys((b"!", b"++", b"--"), "sign"),
           **dict.fromkeys((b"&&", b"||", b"?", b":"), "operator"), b":": ":"},
    headers=frozenset(("class", "def", "if", "else", "for", "while", "do", "switch", "block", "typedef")),
    clauses=frozenset(("else",)),
    loops=frozenset(("for", "while", "do", "switch")),
    binds=dict.fromkeys((b"struct", b"union", b"enum"), Binds.NEXT),
    labels=frozenset(("case", "expression")),
    line_comment=b"//",
    block_comment=(b"/*", b"*/"),
    directive=b"#",
    prefixes=frozenset((b"l", b"u", b"u8")),
)  # fmt: skip

LANGUAGES = {language.name: language for language in (PYTHON, C)}
