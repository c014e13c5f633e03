"""What the names of tokens in a tokenizer's file stand for: bytes, or the places around the hole in a text."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence

# Names of the tokens around the parts of a text with a hole, wherever models have them: what is in front of the hole
# comes behind the first, what is behind it behind the second, what fills it behind the third.
_HOLES = (
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<PRE>", "<SUF>", "<MID>"),
)
Hole = tuple[int, int, int]
NO_HOLE: Hole = (-1, -1, -1)


def hole_of(special_ids: Mapping[str, int]) -> Hole:
    """The tokens in front of the prefix, the suffix and the middle of a text with a hole; -1 of each: there is none."""
    for begin, hole, end in _HOLES:
        if begin in special_ids and hole in special_ids and end in special_ids:
            return special_ids[begin], special_ids[hole], special_ids[end]
    return NO_HOLE


def bytes_of(names: Sequence[str], special_ids: Mapping[str, int]) -> list[bytes]:
    """The bytes that each token stands for; none of a special one."""
    special = set(special_ids.values())
    spelt = byte_level_bytes if "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}" in names else marked_bytes  # its space
    return [b"" if i in special else spelt(name) for i, name in enumerate(names)]


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """The inverse of GPT-2's table: byte-level tokens are spelt with one printable character for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def byte_level_bytes(name: str) -> bytes:
    """The bytes that a token stands for in a byte-level tokenizer; an added token is spelt as it is."""
    table = _bytes_of_characters()
    return bytes(table[c] for c in name) if all(c in table for c in name) else name.encode()


def marked_bytes(name: str) -> bytes:
    """The same in a tokenizer with a mark for spaces, and single bytes as ``<0x0A>``."""
    if re.fullmatch("<0x[0-9A-F]{2}>", name):
        return bytes.fromhex(name[3:5])
    return name.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
