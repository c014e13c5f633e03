"""Texts, tokens and features in a form that tests can read."""

from __future__ import annotations

import functools
import pathlib
import re
import sysconfig

import numpy as np

from dsjax.data.structure.language import LANGUAGES
from dsjax.data.structure.scanner import Scanner
from dsjax.data.structure.vocabulary import Vocabulary
from dsjax.nn.fields import CATEGORIES, COLUMN, KINDS, LEAVES, POINTERS

BYTES = Vocabulary([bytes([byte]) for byte in range(256)])
_PIECE = re.compile(rb" ?\w+|[ \t]*(?:\r?\n)+[ \t]*| ?[^\w\s]+|\s", re.ASCII)


class Read:
    """A text and its features behind each of its tokens; tokens are words, signs and ends of lines with indentation."""

    def __init__(self, text: str | bytes, language: str = "python", pieces: list[bytes] | None = None):
        content = text.encode() if isinstance(text, str) else text
        self.pieces = pieces or [match.group() for match in _PIECE.finditer(content)]
        assert b"".join(self.pieces) == content
        distinct = list(dict.fromkeys(self.pieces))
        numbers = {piece: number for number, piece in enumerate(distinct)}
        self.scanner = Scanner(LANGUAGES[language], Vocabulary(distinct))
        self.tokens = [numbers[piece] for piece in self.pieces]
        self.features = self.scanner.scan(self.tokens)

    def at(self, piece: str, nth: int = 0) -> int:
        """The number of the nth token that is ``piece``, white space apart."""
        found = [i for i, own in enumerate(self.pieces) if own.strip() == piece.encode()]
        return found[nth]

    def behind(self, piece: str, nth: int = 0) -> dict[str, object]:
        """The features there, with names for kinds and leaves, and the tokens that it points to for pointers."""
        i = self.at(piece, nth)
        out: dict[str, object] = {}
        for name, column in COLUMN.items():
            value = int(self.features[i, column])
            if name in ("statement", "kind", "kind_2", "kind_3", "previous"):
                out[name] = KINDS[value]
            elif name == "leaf":
                out[name] = LEAVES[value]
            elif name in POINTERS:
                out[name] = self.pieces[i - value].strip().decode() if value else None
            else:
                out[name] = value
        return out


def byte_features(text: bytes, language: str = "python") -> np.ndarray:
    """The features behind each byte of a text whose tokens are bytes."""
    return Scanner(LANGUAGES[language], BYTES).scan(list(text))


@functools.cache
def library(limit: int = 40, largest: int = 60_000) -> tuple[tuple[str, bytes], ...]:
    """Files of the standard library, every few of them."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts]
    some = [path for path in files[:: max(len(files) // (2 * limit), 1)] if 0 < path.stat().st_size < largest]
    return tuple((str(path.relative_to(root)), path.read_bytes()) for path in some[:limit])


def in_range(features: np.ndarray) -> bool:
    """Whether all of it has an embedding, and points back."""
    sizes = [*CATEGORIES.values(), 33]
    return bool((features >= 0).all() and (features[:, : len(sizes)] < sizes).all())
