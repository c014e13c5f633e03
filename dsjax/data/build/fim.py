"""Fill-in-the-middle: a document cut in three and put together in another order (Bavarian et al. 2022).

    PSM    <begin> prefix <hole> suffix <end> middle         as DeepSeek-Coder (section 3.1), at rate 0.5
    SPM    <begin> <hole> suffix <end> prefix middle         prefix and middle in one piece

so that whoever reads from left to right has seen both sides of the middle when it comes. Cuts are at characters drawn
uniformly, or around a node of the syntax tree (Gong et al. 2025, AST-FIM): then the middle is an expression, a
statement or a function, which is what is asked for when code is completed.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import random
from typing import Literal

import numpy as np
from jaxtyping import Int32

from dsjax.config import Share, UserError
from dsjax.data.build.syntax import parsed
from dsjax.data.marked import Marked, joined

Order = Literal["psm", "spm"]


@dataclasses.dataclass(frozen=True)
class FimTokens:
    """The special tokens; `data.special_tokens` must have the three, see `names`."""

    begin: str = "<|fim_begin|>"
    hole: str = "<|fim_hole|>"
    end: str = "<|fim_end|>"

    @property
    def names(self) -> tuple[str, str, str]:
        """For `data.special_tokens`."""
        return self.begin, self.hole, self.end

    def validate(self) -> None:
        """Raises:
        UserError: two are the same, or one is empty.
        """
        if not all(self.names) or len(set(self.names)) < 3:
            raise UserError(f"begin is {self.begin!r}; begin, hole and end must be distinct and not empty")


@dataclasses.dataclass(frozen=True)
class Fim:
    """How many documents are cut, and where.

    rate: share of the documents.
    spm: share of those in the order SPM; the others are PSM.
    nodes: share of those cut around a node of the syntax tree (Python only); the others at characters.
    tokens: names of the special tokens.
    """

    rate: Share = 0.5
    spm: Share = 0.0
    nodes: Share = 0.5
    tokens: FimTokens = FimTokens()


@dataclasses.dataclass(frozen=True)
class Cut:
    """prefix + middle + suffix is the text that was cut."""

    prefix: str
    middle: str
    suffix: str


def cut_characters(text: str, draw: random.Random) -> Cut:
    """Cuts at two places drawn uniformly; any part may be empty."""
    a, b = sorted((below(draw, len(text) + 1), below(draw, len(text) + 1)))
    return Cut(text[:a], text[a:b], text[b:])


def cut_node(text: str, draw: random.Random) -> Cut | None:
    """Cuts around a node of Python's syntax tree; None if the text does not parse, or holds no statement.

    A character is drawn uniformly, and one of the nodes around it (the smallest expression up to the statement at the
    top level) uniformly: so large and small ones come, from all parts of a file.
    """
    if "\r" in text or text.startswith("\ufeff"):  # there the tree counts characters that it has not
        return None
    tree = parsed(text)
    if isinstance(tree, str) or not tree.body:
        return None
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    place = below(draw, len(text))
    around = _nodes_around(tree, place, starts, text)
    if not around:  # white space or a comment between statements: the statement behind it, or else the last
        extents = [_extent(node, starts, text) for node in tree.body]
        around = [next((extent for extent in extents if extent[0] >= place), extents[-1])]
    begin, end = around[below(draw, len(around))]
    return Cut(text[:begin], text[begin:end], text[end:])


def _nodes_around(tree: ast.Module, place: int, starts: list[int], text: str) -> list[tuple[int, int]]:
    """The extents of all nodes that hold a character, the outermost first."""
    around: list[tuple[int, int]] = []
    nodes: list[ast.AST] = list(tree.body)
    while nodes:
        node = nodes.pop()
        if not hasattr(node, "lineno"):  # arguments, comprehensions ...: only what is in them has a place
            nodes += ast.iter_child_nodes(node)
            continue
        begin, end = _extent(node, starts, text)
        if begin <= place < end:
            around.append((begin, end))
            # Before Python 3.12 what is in an f-string has no right place.
            nodes = [] if isinstance(node, ast.JoinedStr) else list(ast.iter_child_nodes(node))
    return around


def _extent(node: ast.AST, starts: list[int], text: str) -> tuple[int, int]:
    """The characters of a node, decorators included."""
    place: dict[str, int] = vars(node)
    begin = _character(text, starts[place["lineno"] - 1], place["col_offset"])
    for first in getattr(node, "decorator_list", [])[:1]:
        begin = text.rindex("@", 0, _character(text, starts[first.lineno - 1], first.col_offset))
    return begin, _character(text, starts[place["end_lineno"] - 1], place["end_col_offset"])


def _character(text: str, start: int, column: int) -> int:
    """The place of a column, which counts bytes, of the line that begins at ``start``."""
    piece = text[start : start + column]  # a character has at least one byte
    return start + (column if piece.isascii() else len(piece.encode()[:column].decode(errors="ignore")))


def arranged(cut: Cut, order: Order, tokens: FimTokens) -> Marked:
    """The parts in the order in which they are learned."""
    if order == "psm":
        parts = [tokens.begin, cut.prefix, tokens.hole, cut.suffix, tokens.end, cut.middle]
        return joined(parts, special=(0, 2, 4))
    parts = [tokens.begin, tokens.hole, cut.suffix, tokens.end, cut.prefix, cut.middle]
    return joined(parts, special=(0, 1, 3))


def undone(marked: Marked) -> str:
    """The document that :func:`arranged` made this of."""
    if not marked.special:
        return marked.text
    (_, begin), (hole, behind_hole), (end, behind_end) = marked.special
    before, suffix, rest = marked.text[begin:hole], marked.text[behind_hole:end], marked.text[behind_end:]
    return before + rest + suffix  # one of the first two is empty, or the rest is the middle alone


def fill_in_the_middle(text: str, *, python: bool, cfg: Fim, draw: random.Random) -> tuple[Marked, str]:
    """A document as it is learned, and what was done: "as it is", or order and kind of cut ("psm, node" ...).

    A text that spells one of the special tokens stays as it is: for readers that do not look at spans it would be
    ambiguous.
    """
    cut_it, spm, at_node = (draw.random() < share for share in (cfg.rate, cfg.spm, cfg.nodes))
    if not cut_it or not text or any(name in text for name in cfg.tokens.names):
        return Marked(text), "as it is"
    order: Order = "spm" if spm else "psm"
    cut = cut_node(text, draw) if at_node and python else None
    kind = "node" if cut else "characters"
    return arranged(cut or cut_characters(text, draw), order, cfg.tokens), f"{order}, {kind}"


def below(draw: random.Random, n: int) -> int:
    """An integer in [0, n). Of Python's generators only `random()` is promised to stay as it is."""
    return min(int(draw.random() * n), n - 1)


def fim_window(
    window_N: Int32[np.ndarray, " N"], token_ids: tuple[int, int, int], *, end_id: int, cfg: Fim, draw: random.Random
) -> Int32[np.ndarray, " N"]:
    """Fill-in-the-middle of packed rows, at training time: each document of a window of the stream by itself.

    Documents lie between boundaries, so no cut joins two of them; the first and the last are the parts that are in the
    window. Each that is cut grows by three tokens, and what no longer fits is lost at the end of the window. Cuts are
    between tokens.

    Args:
        window_N: T + 1 ids of the stream: inputs are all but the last, targets all but the first.
        token_ids: of begin, hole and end.
        end_id: the boundary.
        cfg: `rate` and `spm` are used.
    """
    begin, hole, end = ([i] for i in token_ids)
    out: list[int] = []
    bounds = [*np.flatnonzero(window_N == end_id).tolist(), window_N.size]
    if bounds[0] > 0:
        bounds.insert(0, -1)  # the window begins inside a document
    for boundary, after in itertools.pairwise(bounds):
        out += window_N[max(boundary, 0) : boundary + 1].tolist()
        ids = window_N[boundary + 1 : after].tolist()
        a, b = sorted((below(draw, len(ids) + 1), below(draw, len(ids) + 1)))
        cut_it, spm = draw.random() < cfg.rate, draw.random() < cfg.spm
        prefix, middle, suffix = ids[:a], ids[a:b], ids[b:]
        if not cut_it or not ids:
            out += ids
        elif spm:
            out += begin + hole + suffix + end + prefix + middle
        else:
            out += begin + prefix + hole + suffix + end + middle
    return np.asarray(out[: window_N.size], np.int32)
