"""Tokens that stand for a text's form with layout (:mod:`dsjax.data.layout`), and the text that they stand for."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from dsjax.config import UserError
from dsjax.data.layout import DEDENT, IN_FULL, Layout
from dsjax.data.token_names import NO_HOLE, Hole

# A tokenizer's file says it in a comment of the pattern that cuts texts, which the signs are part of.
_STATED, _KNOWN = re.compile(r"\(\?#layout: ([^)]*)\)"), "python 1"
_LINE_END = r"(?:\r?\n)+[ \t]*"


def with_layout(pattern: str) -> str:
    """The pattern that cuts the form of texts as another one cuts texts: signs belong to the end of the line before."""
    signs = (DEDENT + IN_FULL).decode()
    assert _LINE_END in pattern
    said = _LINE_END.replace("+[", "+[" + "".join(f"\\x{ord(c):02x}" for c in signs) + "]*[")
    return f"(?#layout: {_KNOWN})" + pattern.replace(_LINE_END, said)


def states_layout(pre_tokenizer: str) -> bool:
    """Whether part of a tokenizer's file says that its tokens stand for the form of texts.

    Raises:
        UserError: for one that is not known here.
    """
    stated = _STATED.search(pre_tokenizer)
    if stated is not None and stated[1] != _KNOWN:
        raise UserError(f"the tokenizer has the layout {stated[1]!r}; the one that is known here is {_KNOWN!r}")
    return stated is not None


class Writer:
    """The text of tokens as they come.

    Special tokens begin a text of their own, but that the middle of a text with a hole goes on behind the prefix.

    Args:
        texts: what each token stands for in the form; empty: it is special.
        hole: the tokens around the parts of a text with a hole.

    Attributes:
        layout: where the text is.
    """

    def __init__(self, texts: Sequence[bytes], hole: Hole = NO_HOLE):
        self._texts, self._hole = texts, hole
        self.layout = Layout()
        self._prefix: Layout | None = None  # where the middle goes on

    def copy(self) -> Writer:
        """Another one at this place, in constant time."""
        other = Writer(self._texts, self._hole)
        other.layout = self.layout.copy()
        other._prefix = None if self._prefix is None else self._prefix.copy()
        return other

    def add(self, token: int) -> bytes:
        """What one more token adds to the text, without blanks that wait for what comes."""
        said = self._texts[token] if 0 <= token < len(self._texts) else b""
        if said:
            return self.layout.write(said)
        _, hole, end = self._hole
        if token == end and self._prefix is not None:
            self.layout, self._prefix = self._prefix, None
        else:
            self._prefix = self.layout if token == hole else None
            self.layout = Layout()
        return b""


def said(parts: Sequence[str | int], writer: Writer) -> list[str | int]:
    """The forms of texts that follow one another, with tokens between some of them.

    Texts without a token between them are one text, which is cut there.
    """
    out = list[str | int]()
    for is_text, run in itertools.groupby(parts, lambda part: isinstance(part, str)):
        if is_text:
            texts = [str(part).encode() for part in run]
            cuts = list(itertools.accumulate(map(len, texts)))[:-1]
            out += [part.decode() for part in writer.layout.say(b"".join(texts), cuts)]
        else:
            for token in run:
                writer.add(int(token))
                out.append(token)
    return out
