"""The picture of the structure of a text: it shows the text, and of each token what the model is told."""

from __future__ import annotations

import functools
import io
import re
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from dsjax.config import UserError
from dsjax.data.structure.picture import COLOURS, ENDED, HEIGHT, LATER, NAME, SEEN, Told, picture
from dsjax.data.structure.stored import scanner
from dsjax.data.tokenizer import Tokenizer, train_tokenizer

CODE = textwrap.dedent(
    """\
    def first(items, key):
        seen = []
        for item in items:
            if key(item):
                seen.append(item)
            else:
                return g(seen)
        return seen
    """
)


@functools.cache
def tokenizer(layout: bool = False) -> Tokenizer:
    return train_tokenizer([CODE] * 2, 330, layout=layout)


def told(text: str = CODE) -> Told:
    return Told.of(text, tokenizer())


def words(of: Told, tokens: list[int]) -> list[str]:
    """The text of tokens."""
    begins = [0, *of.ends_T.tolist()]
    return [of.text[begins[t] : begins[t + 1]].strip() for t in tokens]


def drawn(figure: Figure) -> None:
    figure.savefig(io.BytesIO())


# ---------------------------------------------------------------- what is told


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab(:\n\t #\"'$é€", min_size=1, max_size=60).filter(str.strip))
def test_pieces_at_their_columns_are_the_text(text: str) -> None:
    found = Told.of(text, tokenizer())
    assert found.text == text
    lines = [""] * (text.count("\n") + 1)
    for piece in found.pieces:
        assert len(lines[piece.line]) == piece.begin
        assert len(piece.text) == piece.end - piece.begin
        lines[piece.line] += piece.text
    assert lines == text.expandtabs(8).split("\n")


def test_wide_characters_take_two_columns() -> None:
    pieces = Told.of("漢 = '字'; x", tokenizer()).pieces
    assert next(piece.begin for piece in pieces if "x" in piece.text) == len("xx = 'xx'; ")


def test_features_are_those_of_the_scanner() -> None:
    features_TC = scanner("python", tokenizer()).scan(tokenizer().encode(CODE))
    np.testing.assert_array_equal(told().features_TC, features_TC)


def test_a_token_is_chosen_by_the_last_place_of_some_words() -> None:
    found = told()
    token = found.token("seen.append(item")
    assert CODE[: found.ends_T[token]].endswith("seen.append(item")
    assert found.ends_T[found.token("seen")] == CODE.rindex("seen") + 4


def test_open_blocks_and_what_a_token_is_told_by_hand() -> None:
    found = told()
    token = found.token("(item")
    assert words(found, found.blocks(token)) == ["if", "for", "def"]
    assert [found.block_kind(header) for header in found.blocks(token)] == ["if", "for", "def"]
    said = {name: found.said(token, name) for name in ("leaf", "kind", "kind_2", "previous", "definition", "depth")}
    assert said == {
        "leaf": "name",
        "kind": "call",
        "kind_2": "if",
        "previous": "none",
        "definition": "def, loop",
        "depth": "3",
    }
    assert found.said(token, "balance") == "not known"
    at_end = found.token("return seen")
    assert found.said(at_end, "definition") == "def"
    assert words(found, [found.target(at_end, "name") or 0]) == ["seen"]
    assert found.said(at_end, "bracket") == "none"


def test_what_is_open_is_seen_and_nothing_else_by_hand() -> None:
    found = told()
    seen_T = found.seen_from(found.token("g(seen"))
    begins = [0, *found.ends_T.tolist()]
    parts = [CODE[begins[t] : begins[t + 1]] for t in range(len(seen_T))]
    masked = "".join(
        part if seen else re.sub(r"[^\n]", "~", part) for part, seen in zip(parts, seen_T, strict=True)
    ).split("\n")
    assert masked[0] == "def first(items, key):"  # of an open block the header, and what it has in brackets
    assert masked[1].lstrip("~ ").startswith("seen =")
    assert masked[2].strip() == "for item in items:"
    assert masked[3].strip("~ ").startswith("if key")
    assert "item" not in masked[3]  # the brackets of a header whose block has ended
    assert "append" not in "".join(masked)  # the block has ended
    assert masked[5].strip("~ ").startswith("else")
    assert masked[6].strip("~ ") == "return g(seen"
    assert "".join(masked[7:]).strip("~") == ""  # not there yet


# ---------------------------------------------------------------- what is drawn


def test_both_panels_show_all_words_where_they_stand() -> None:
    figure = picture(CODE, tokenizer(), at="(item")
    for axes in figure.axes[:2]:
        lines: dict[float, str] = {}
        for text in axes.texts[2:]:  # behind the titles
            x, y = text.get_position()
            lines[y] = lines.get(y, "").ljust(round(x)) + text.get_text()
        assert [lines[y] for y in sorted(lines)] == CODE.splitlines()


def test_colours_are_those_of_the_innermost_nodes() -> None:
    axes = picture(CODE, tokenizer(), at="(item").axes[0]
    boxes = [box.get_facecolor()[:3] for box in axes.patches if isinstance(box, FancyBboxPatch)]
    for kind, times in (("def", 1), ("for", 1), ("if", 2)):  # rails; `else` has the colour of `if`
        assert boxes.count(to_rgb(COLOURS[kind])) == times
    warm = [c for c in boxes if c[0] > c[1] > c[2]]  # parameters and calls, and no block
    assert len(warm) == 4  # what opens and closes in one token, as the list, is open behind none


def test_arrows_lead_from_the_names_of_the_line_to_their_bindings() -> None:
    axes = picture(CODE, tokenizer(), at="append(item").axes[0]
    arrows = [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]
    paths = [arrow.get_path().vertices for arrow in arrows if to_rgb(NAME) == arrow.get_edgecolor()[:3]]
    middle = {(line, name): CODE.splitlines()[line].index(name) + 2 for line, name in ((1, "seen"), (4, "seen"))}
    middle |= {(line, name): CODE.splitlines()[line].index(name) + 2 for line, name in ((2, "item"), (4, "item"))}
    assert len(paths) == 2
    for name, line in (("seen", 1), ("item", 2)):
        (path,) = (path for path in paths if abs(path[0][0] - middle[4, name]) < 0.1)
        assert 4 * HEIGHT < path[0][1] < 5 * HEIGHT
        assert min(np.hypot(path[:, 0] - middle[line, name], path[:, 1] - (line + 0.85) * HEIGHT)) < 0.3


def test_the_second_panel_masks_what_is_not_seen() -> None:
    axes = picture(CODE, tokenizer(), at="g(seen").axes[1]
    colours = {}
    for text in axes.texts[2:]:
        colours.setdefault(text.get_text(), []).append(text.get_color())
    assert colours[".append"] == [ENDED]
    assert colours["return"][-1] == LATER
    assert ENDED not in colours["def"]
    assert any(to_rgb(SEEN) == patch.get_facecolor()[:3] for patch in axes.patches)


def test_a_text_whose_tokens_say_its_layout_is_drawn_alike() -> None:
    lines = []
    for layout in (False, True):
        pieces = Told.of(CODE, tokenizer(layout)).pieces
        lines.append(["".join(piece.text for piece in pieces if piece.line == line).strip() for line in range(8)])
    assert lines[0] == lines[1] == [line.strip() for line in CODE.splitlines()]


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("x = '$a$ 漢 😀 \\x0c'\x0c\n", "x"),  # neither mathematics nor a warning about glyphs
        ("if a: b\n", "b"),  # a block in the line of its header
        ("x\r\n\ty\r\n", "\n"),  # a token of which nothing can be seen
        (")]}\n  else:\n", "else"),  # no program
        ("é", "é"),
    ],
)
def test_any_text_can_be_drawn(text: str, at: str) -> None:
    drawn(picture(text, tokenizer(), at=at))


def test_another_language_can_be_drawn() -> None:
    figure = picture("int f(int a)\n{\n\twhile (a) {\n\t\ta--;\n\t}\n}\n", tokenizer(), at="a--", language="c")
    rails = [box.get_facecolor()[:3] for box in figure.axes[0].patches]
    assert to_rgb(COLOURS["while"]) in rails
    drawn(figure)


@pytest.mark.parametrize(
    ("text", "at", "said"),
    [
        ("", "x", "0 columns"),
        (" \n\n", "\n", "not blank"),
        ("x\n" * 61, "x", "61 lines"),
        ("x" * 111, "x", "111 columns"),
        ("x = 1", "y", "'y'"),
        ("x = 1", "", "''"),
    ],
)
def test_what_can_not_be_drawn_is_refused(text: str, at: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        picture(text, tokenizer(), at=at)
