"""A picture of what a model is told of the structure of a text: see docs/coder.md."""

from __future__ import annotations

import dataclasses
import itertools
import unicodedata
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int16, Int32

from dsjax.config import UserError
from dsjax.data.structure.stored import scanner
from dsjax.data.token_names import bytes_of
from dsjax.data.tokenizer import Tokenizer
from dsjax.nn.fields import BALANCES, CATEGORIES, COLUMN, DEFINITIONS, KINDS, LEAVES, POINTERS
from dsjax.nn.structure import Scopes, with_new_scopes

MOST_LINES, MOST_COLUMNS = 60, 110
TAB = 8  # columns, as Python counts them

# Hues by what nodes have in common; a block is filled with its colour mixed with white, its rail has it as it is.
_HUES = {
    "#4c72b0": ("def", "async_def"),
    "#8172b3": ("class", "bases"),
    "#3f9a6b": ("if", "elif", "else", "match", "case", "switch"),
    "#2a97a8": ("for", "while", "do"),
    "#c0567a": ("try", "except", "finally", "with"),
    "#e0a030": ("call",),
    "#b5b03a": ("parameters", "lambda"),
    "#d9703f": ("list", "subscript", "braces", "parens"),
    "#a5824b": ("format", "field"),
}
COLOURS = {kind: colour for colour, kinds in _HUES.items() for kind in kinds}
OTHER, UNKNOWN = "#8a94a3", "\N{WHITE SQUARE}"
LEAF_COLOURS = {"comment": "#7b8794", "string": "#2f7d5b", "string_end": "#2f7d5b", "format": "#2f7d5b"}
INK, PALE_INK, ENDED, LATER, SEEN = "#1f2933", "#5f6b7a", "#b4bcc7", "#dbe0e6", "#ffe08a"
HERE, NAME, BRACKET = "#c2255c", "#c2255c", "#a8690a"
HEIGHT, ABOVE, UNDER = 2.1, 2.1, 6.1  # a line in columns; lines above the text, and under the legend
MARGIN, LEAST_COLUMNS = 2, 50
INCHES = 0.098  # a column


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a token that stands in one line: columns from begin to end, and as many characters, maybe blanks."""

    token: int
    line: int
    begin: int
    end: int
    text: str

    @property
    def ink(self) -> int:
        """The column that what can be seen of it begins in."""
        return self.begin + len(self.text) - len(self.text.lstrip(" "))

    @property
    def middle(self) -> float:
        """Of what can be seen of it behind an opening bracket, in columns."""
        return (self.begin + len(self.text) - len(self.text.lstrip(" ([{")) + self.end) / 2


@dataclasses.dataclass(frozen=True)
class Told:
    """A text as a model is told of it.

    Attributes:
        text: all of it.
        ends_T: where each token ends in it, in characters.
        features_TC: of each token (:mod:`dsjax.nn.fields`).
        pieces: of the tokens, in order.
    """

    text: str
    ends_T: Int32[np.ndarray, " T"]
    features_TC: Int16[np.ndarray, "T C"]
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, text: str, tokenizer: Tokenizer, language: str = "python") -> Told:
        """A text in a language, as the tokens of a tokenizer.

        Raises:
            UserError: it is empty, or too large for a picture.
        """
        tokens_T = tokenizer.encode(text)
        if tokenizer.layout:
            said = list(map(tokenizer.writer().add, tokens_T.tolist()))
        else:
            texts = bytes_of(tokenizer.names(), tokenizer.special_ids)
            said = [texts[token] for token in tokens_T]
        whole = b"".join(said)
        # A character belongs to the token that its first byte is in.
        begins = np.frombuffer(whole, np.uint8) & 0xC0 != 0x80
        characters = np.concatenate([[0], np.cumsum(begins)])
        ends_T = characters[np.cumsum([len(part) for part in said], dtype=np.int64)].astype(np.int32)
        text = whole.decode(errors="replace")
        lines = text.count("\n") + (not text.endswith("\n"))
        pieces = _placed(text, ends_T)
        columns = max((piece.end for piece in pieces), default=0)
        if not text.strip() or lines > MOST_LINES or columns > MOST_COLUMNS:
            raise UserError(
                f"a text of {lines} lines and {columns} columns; a picture needs one that is not blank, of at most"
                f" {MOST_LINES} lines and {MOST_COLUMNS} columns"
            )
        return cls(text, ends_T, scanner(language, tokenizer).scan(tokens_T), pieces)

    def token(self, words: str) -> int:
        """The token that some words end in where they stand last.

        Raises:
            UserError: they are nowhere.
        """
        begin = self.text.rfind(words)
        if begin < 0 or not words:
            raise UserError(f"the text has no {words!r} that a token could be chosen by")
        return int(np.searchsorted(self.ends_T, begin + len(words)))

    def value(self, token: int, name: str) -> int:
        """A feature of a token."""
        return int(self.features_TC[token, COLUMN[name]])

    def said(self, token: int, name: str) -> str:
        """A feature of a token in words."""
        value = self.value(token, name)
        if name == "leaf":
            return LEAVES[value]
        if name in ("statement", "kind", "kind_2", "kind_3", "previous"):
            return KINDS[value]
        if name == "definition":
            return DEFINITIONS[value % len(DEFINITIONS)] + ", loop" * (value >= len(DEFINITIONS))
        if name == "balance":
            return f"{value - BALANCES // 2 - 1:+}" if value else "not known"
        if name in POINTERS:
            return f"{value} back" if value else "none"
        return str(value)

    def target(self, token: int, pointer: str) -> int | None:
        """The token that a pointer of another one leads to, if there is one."""
        back = self.value(token, pointer)
        return token - back if 0 < back <= token else None

    def blocks(self, token: int) -> list[int]:
        """Where the statements begin whose blocks are open behind a token, the innermost first."""
        found = []
        header = self.target(token, "block")
        while header is not None:
            found.append(header)
            header = self.target(header, "block")
        return found

    def block_kind(self, header: int) -> str:
        """The kind of the block that the statement opens which begins in a token."""
        for token in range(header, len(self.features_TC)):
            if self.target(token, "block") == header and not self.value(token, "brackets"):
                return KINDS[self.value(token, "kind")]
        return "none"

    def seen_from(self, token: int) -> Bool[np.ndarray, " T"]:
        """True for the tokens that a head which sees only what is open sees from one: the mask of the models."""
        T = len(self.features_TC)
        features_BTC, ids_BT = jnp.asarray(self.features_TC)[None], jnp.ones((1, T), jnp.int32)
        scopes = with_new_scopes(Scopes.none(1, T), features_BTC, ids_BT, jnp.zeros(1, jnp.int32))
        return (np.arange(T) <= token) & (token < np.asarray(scopes.closes_BS)[0])


def _placed(text: str, ends_T: Int32[np.ndarray, " T"]) -> tuple[Piece, ...]:
    pieces, line, column = list[Piece](), 0, 0
    for token, (first, last) in enumerate(itertools.pairwise([0, *ends_T.tolist()])):
        for number, part in enumerate(text[first:last].split("\n")):
            if number:
                line, column = line + 1, 0
            begin, drawn = column, ""
            for c in part:
                width = _width(c, column)
                drawn += " " * width if c == "\t" else c.ljust(width)[:width]
                column += width
            if drawn:
                pieces.append(Piece(token, line, begin, column, drawn))
    return tuple(pieces)


def _width(character: str, column: int) -> int:
    if character == "\t":
        return TAB - column % TAB
    if unicodedata.combining(character) or character == "\r":
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


# ---------------------------------------------------------------- drawing


def picture(text: str, tokenizer: Tokenizer, *, at: str, language: str = "python") -> Any:
    """A figure of matplotlib: to the left what is told of each token of a text, to the right what a scope head sees.

    Args:
        text: some lines of code.
        tokenizer: of the tokens.
        at: some words: the token that they end in, where they stand last, is the one whose features and sight are
            shown.
        language: of the text.

    Raises:
        UserError: the text is empty or too large, or there are no such words.
    """
    from matplotlib.figure import Figure

    told = Told.of(text, tokenizer, language)
    token = told.token(at)
    seen_T = told.seen_from(token)
    columns = max(max(piece.end for piece in told.pieces) + 5, LEAST_COLUMNS)
    lines = max(piece.line for piece in told.pieces) + 1
    entries = _entries(told, 2 * (columns - MARGIN))
    under = UNDER + len(entries)
    rows = ABOVE + lines + under
    figure = Figure(figsize=(2 * columns * INCHES, rows * HEIGHT * INCHES))
    left, right = (figure.add_axes((x, under / rows, 0.5, 1 - under / rows)) for x in (0.0, 0.5))
    below = figure.add_axes((0, 0, 1, under / rows))
    code, legend = (columns, -ABOVE, lines), (2 * columns, -len(entries), UNDER)
    for axes, (wide, top, bottom) in ((left, code), (right, code), (below, legend)):
        axes.set(xlim=(-MARGIN, wide - MARGIN), ylim=(bottom * HEIGHT, top * HEIGHT))
        axes.axis("off")

    _title(left, "What each token is told", "colour: the innermost node that is open behind it")
    _blocks(left, told, columns - MARGIN - 1)
    _brackets(left, told)
    _tokens(left, told, {})
    _pointers(left, told, token)
    _outline(left, told, token)

    _title(right, "What a scope head sees from the outlined token", "what is still open; all else has ended")
    _sight(right, told, seen_T)
    ended, later = np.flatnonzero(~seen_T[:token]).tolist(), range(token + 1, len(seen_T))
    _tokens(right, told, dict.fromkeys(ended, ENDED) | dict.fromkeys(later, LATER))
    _outline(right, told, token)

    _legend(below, entries)
    _card(below, told, token, 2 * columns - 2 * MARGIN)
    return figure


def _title(axes: Any, title: str, below: str) -> None:
    axes.text(0, -1.25 * HEIGHT, title, fontsize=11, fontweight="bold", color=INK)
    axes.text(0, -0.5 * HEIGHT, below, fontsize=8.5, color=PALE_INK)


def _box(axes: Any, begin: float, end: float, top: float, bottom: float, colour: Any, **style: Any) -> None:
    from matplotlib.patches import FancyBboxPatch

    shape = "round,pad=0,rounding_size=0.45"
    box = FancyBboxPatch((begin, top), end - begin, bottom - top, boxstyle=shape, facecolor=colour, **style)
    axes.add_patch(box)


def _pale(colour: str, share: float) -> tuple[float, float, float]:
    """A colour, mixed with white."""
    from matplotlib.colors import to_rgb

    red, green, blue = (1 - share * (1 - c) for c in to_rgb(colour))
    return red, green, blue


def _blocks(axes: Any, told: Told, right: float) -> None:
    """A box for each block from its first line to its last one, and a rail that leads up to its opener."""
    first = {piece.token: piece for piece in reversed(told.pieces) if piece.text.strip()}
    inside = dict[int, list[Piece]]()
    for piece in first.values():
        for header in told.blocks(piece.token):
            inside.setdefault(header, []).append(piece)
    for header, pieces in sorted(inside.items()):
        opener = first.get(header)
        body = [piece for piece in pieces if opener is not None and piece.line > opener.line]
        if opener is None or not body:
            continue  # nothing can be seen of its header, or the block stands in the same line
        colour = COLOURS.get(told.block_kind(header), OTHER)
        begin, end = min(opener.ink, min(p.ink for p in body) - 1) - 0.35, right + 0.8 - 0.8 * len(told.blocks(header))
        top, bottom = (min(p.line for p in body)) * HEIGHT, (max(p.line for p in body) + 1) * HEIGHT
        _box(axes, begin, end, top, bottom - 0.12, _pale(colour, 0.17), linewidth=0)
        _box(axes, begin + 0.35, begin + 0.85, top + 0.25, bottom - 0.3, colour, linewidth=0)
        tip = [(begin + 0.6, top - 0.1), (begin + 0.05, top + 0.75), (begin + 1.15, top + 0.75)]
        axes.fill(*zip(*tip, strict=True), color=colour, linewidth=0)


def _runs(told: Told, chosen_T: np.ndarray) -> Iterator[list[Piece]]:
    """Pieces of chosen tokens that stand in a line without others between them."""
    for (_, chosen), pieces in itertools.groupby(told.pieces, lambda piece: (piece.line, bool(chosen_T[piece.token]))):
        run = [piece for piece in pieces if piece.text.strip()]
        if chosen and run:
            yield run


def _brackets(axes: Any, told: Told) -> None:
    """A box for what stands in brackets, and within it one for what stands in further ones."""
    for level in (1, 2, 3):
        for run in _runs(told, told.features_TC[:, COLUMN["brackets"]] >= level):
            first = run[0]
            around = told.value(first.token, "brackets") - level  # brackets within those of this level
            if around <= 2:
                kind = KINDS[told.value(first.token, ("kind", "kind_2", "kind_3")[around])]
                inset, colour = 0.12 + 0.2 * level, _pale(COLOURS.get(kind, OTHER), 0.3 + 0.16 * (level - 1))
                top, bottom = first.line * HEIGHT + inset, (first.line + 1) * HEIGHT - inset - 0.1
                _box(axes, first.ink, run[-1].end, top, bottom, colour, linewidth=0)


def _tokens(axes: Any, told: Told, colours: dict[int, str]) -> None:
    """The text, each token by itself: words of the language are bold, comments and strings in other colours."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    size = 72 * INCHES / 0.602  # points, of a font whose characters are 0.602 as wide as they are high
    plain, bold = (FontProperties(family="monospace", size=size, weight=weight) for weight in ("normal", "bold"))
    drawable = get_font(findfont(plain)).get_charmap()
    for piece in told.pieces:
        leaf = LEAVES[told.value(piece.token, "leaf")]
        word = "".join(c if ord(c) in drawable else UNKNOWN for c in piece.text.strip())
        if word:
            colour = colours.get(piece.token, LEAF_COLOURS.get(leaf, INK))
            font = bold if leaf.isalpha() and leaf == word else plain
            place = piece.ink, (piece.line + 0.72) * HEIGHT
            axes.text(*place, word, color=colour, parse_math=False, fontproperties=font)


def _pointers(axes: Any, told: Told, token: int) -> None:
    """Arrows from the tokens of a line: names to where they were bound, and one token to the bracket around it."""
    from matplotlib.patches import FancyArrowPatch

    places = {p.token: (p.middle, p.line) for p in reversed(told.pieces) if p.text.strip()}
    line = places[token][1] if token in places else -1
    arrows = [(t, told.target(t, "name"), NAME) for t, (_, at) in places.items() if at == line]
    arrows.append((token, told.target(token, "bracket"), BRACKET))
    for begin, end, colour in arrows:
        if end is None or end not in places or begin not in places:
            continue
        (x, y), (to_x, to_y) = places[begin], places[end]
        edge = 0.15 if to_y < y else 0.9  # of the line that the arrow ends at
        bent = f"arc3,rad={0.22 if to_x <= x else -0.22}"
        style: Any = {"arrowstyle": "-|>", "mutation_scale": 8, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
        ends = (x, (y + 0.2) * HEIGHT), (to_x, (to_y + 1 - edge) * HEIGHT)
        axes.add_patch(FancyArrowPatch(*ends, connectionstyle=bent, color=colour, **style))


def _outline(axes: Any, told: Told, token: int) -> None:
    for piece in told.pieces:
        if piece.token == token and piece.text.strip():
            top = piece.line * HEIGHT + 0.1
            _box(axes, piece.ink - 0.1, piece.end + 0.1, top, top + HEIGHT - 0.3, "none", edgecolor=HERE, linewidth=1.6)


def _sight(axes: Any, told: Told, seen_T: np.ndarray) -> None:
    """A box around what is seen, by lines."""
    for run in _runs(told, seen_T):
        top = run[0].line * HEIGHT + 0.14
        _box(axes, run[0].ink - 0.2, run[-1].end + 0.2, top, top + HEIGHT - 0.38, SEEN, linewidth=0)


def _entries(told: Told, wide: float) -> list[list[tuple[str, Any, bool, float]]]:
    """Lines of the legend: words, their colour, whether it is that of an arrow, and the column of each."""
    shown = {KINDS[k] for k in told.features_TC[:, COLUMN["kind"]]}
    kinds = [(kind, _pale(COLOURS[kind], 0.6), False) for kind in KINDS if kind in shown and kind in COLOURS]
    sight = [("seen", SEEN, False), ("has ended", ENDED, False), ("not there yet", LATER, False)]
    arrows = [("to the name's binding", NAME, True), ("to the bracket", BRACKET, True)]
    arrows.append(("to the block's header", INK, True))
    lines = list[list[tuple[str, Any, bool, float]]]()
    for group in (kinds, sight + arrows):
        column = wide  # each group begins a line
        for words, colour, is_arrow in group:
            size = 5 + 0.74 * len(words)
            if column + size > wide:
                lines.append([])
                column = 0.0
            lines[-1].append((words, colour, is_arrow, column))
            column += size
    return lines


def _legend(axes: Any, entries: list[list[tuple[str, Any, bool, float]]]) -> None:
    for number, line in enumerate(entries):
        top = (0.6 + number - len(entries)) * HEIGHT
        for words, colour, is_arrow, column in line:
            if is_arrow:
                style = {"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0}
                axes.annotate("", (column, top + 0.6), (column + 2.2, top + 0.6), arrowprops=style)
            else:
                _box(axes, column + 0.4, column + 1.9, top, top + 1.2, colour, linewidth=0)
            axes.text(column + 2.7, top + 1.0, words, fontsize=8.5, color=INK)


def _card(axes: Any, told: Told, token: int, wide: float) -> None:
    """All features of a token."""
    axes.text(0, 1.6 * HEIGHT, "What the outlined token is told", fontsize=9.5, fontweight="bold", color=INK)
    cells = [(name, told.said(token, name)) for name in (*CATEGORIES, *POINTERS)]
    half = -(-len(cells) // 2)
    for number, (name, value) in enumerate(cells):
        column, top = number % half * wide / half, (2.5 + number // half * 1.9) * HEIGHT
        axes.text(column, top, name, fontsize=7.5, color=PALE_INK)
        axes.text(column, top + 0.85 * HEIGHT, value, fontsize=8.5, color=INK, family="monospace")
