"""Indentation said relative to the line before: every text has such a form, and every form is that of a text."""

from __future__ import annotations

import ast
import io
import itertools
import textwrap
import tokenize

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from structure_cases import library

from dsjax.data.layout import DEDENT, IN_FULL, WIDEST, Layout
from dsjax.data.structure.nesting import Nesting

# Whatever may open, close, cut or indent something, and signs where nobody expects them.
PARTS = (
    "a", "x y", "return", "if", ":", " ", "    ", "\t", "\n", "\r", "\r\n", "\\", "\\\n", "(", ")", "[", "]", "{", "}",
    "{{", "'", '"', '"""', "'''", "f'", 'f"""', 'rb"', "rf'", "xf'", "#", "# c", "\\N{", "!r", "=", "é", "深", "\x0c",
    "\x0f", "\x10", "\x0f\x0f", "\n    ", "\n        ", "\n\x0f", "\n\x10  ",
)  # fmt: skip
CODE = st.lists(st.sampled_from(PARTS), max_size=40).map(lambda parts: "".join(parts).encode())
CUTS = st.lists(st.integers(0, 200), max_size=6)


def said(text: str | bytes) -> bytes:
    (form,) = Layout().say(text.encode() if isinstance(text, str) else text)
    return form


def shown(text: str) -> str:
    """The form of a text with letters for the signs."""
    return said(text).decode().replace("\x0f", "<").replace("\x10", "|")


def pieces(content: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({min(cut, len(content)) for cut in cuts})
    return [content[begin:end] for begin, end in itertools.pairwise((0, *places, len(content)))]


# ---------------------------------------------------------------- there and back


@settings(max_examples=600, deadline=None)
@given(CODE | st.binary(max_size=80), CUTS)
@example(b"  # a\n", [])  # a comment alone is a line like any other
@example(b"if x:\n    y\n  # aside\n    z", [])
@example(b"\t \n \x0f\n", [2])
def test_every_text_comes_back_however_its_form_is_cut(text: bytes, cuts: list[int]) -> None:
    layout = Layout()
    assert b"".join(layout.write(piece) for piece in pieces(said(text), cuts)) == text


@settings(max_examples=400, deadline=None)
@given(CODE | st.binary(max_size=80), CUTS)
def test_whatever_there_is_is_the_form_of_a_text_and_no_piece_is_taken_back(form: bytes, cuts: list[int]) -> None:
    whole, layout = Layout(), Layout()
    text = whole.write(form)
    assert b"".join(layout.write(piece) for piece in pieces(form, cuts)) == text
    assert layout.waiting == whole.waiting
    assert len(text) <= len(form) * (WIDEST + 1)
    assert Layout().write(said(text)) == text


@settings(max_examples=400, deadline=None)
@given(CODE, CUTS)
def test_a_text_may_be_read_in_parts(text: bytes, cuts: list[int]) -> None:
    """As the parts in front of a hole and in it are: what they leave behind is what their forms leave behind."""
    reading, writing = Layout(), Layout()
    for piece in pieces(text, cuts):
        (form,) = reading.say(piece)
        assert writing.write(form) == piece
        assert (reading.where, reading.level, reading.waiting) == (writing.where, writing.level, writing.waiting)


@settings(max_examples=400, deadline=None)
@given(CODE, CUTS)
def test_a_form_is_cut_where_its_text_is(text: bytes, cuts: list[int]) -> None:
    places = sorted(min(cut, len(text)) for cut in cuts)
    parts, layout = Layout().say(text, places), Layout()
    assert b"".join(parts) == said(text)
    assert len(parts) == len(places) + 1
    written = 0
    for part, place in zip(parts, places, strict=False):
        written += len(layout.write(part))
        # Blanks go with what stands in front of them or behind: they are in one of the parts, or wait.
        between = text[min(written, place) : max(written, place)]
        assert not between.strip(b" \t"), (part, between)


def test_real_files_come_back_and_so_does_what_is_left_of_them() -> None:
    for name, content in library(30):
        assert Layout().write(said(content)) == content, name
        for end in range(1, len(content), max(len(content) // 5, 1)):
            for part in (content[:end], content[end:]):
                assert Layout().write(said(part)) == part, (name, end)


# ---------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("", ""),
        ("if x:\n    y\n    z\nw\n", "if x:\n    y\nz\n<w\n"),
        ("def f():\n    if x:\n        y\n\n\ng()\n", "def f():\n    if x:\n    y\n\n\n<<g()\n"),
        ("if x:\n  y\nelse:\n\tz\n", "if x:\n  y\n<else:\n\tz\n"),  # any blanks
        ("if x:\r\n    y\r\n    z\r\n", "if x:\r\n    y\r\nz\r\n"),
        # Within a statement, as well; at its end that is forgotten.
        ("    f(a,\n      b,\n      c)\n    g()\n", "    f(a,\n  b,\nc)\ng()\n"),
        ("x = [\n    1,\n    [\n        2,\n    ],\n]\ny\n", "x = [\n    1,\n[\n    2,\n<],\n<]\ny\n"),
        ('    """A.\n\n    B:\n        c\n    d\n    """\n    e\n', '    """A.\n\nB:\n    c\n<d\n"""\ne\n'),
        ("    x = y + \\\n        z\n    w\n", "    x = y + \\\n    z\nw\n"),
        ("    f'''{\n        x\n    }'''\n    y\n", "    f'''{\n    x\n<}'''\ny\n"),
        # A string that nobody closed ends with its line; a bracket does not.
        ("    x = 'a\n    y\n", "    x = 'a\ny\n"),
        ("    f(\n  a\n  b\n", "    f(\n<  a\nb\n"),
        # Comments belong to what follows or to what was before; elsewhere they stand in full, and change nothing.
        ("if x:\n    y\n# w is\nw\n", "if x:\n    y\n<# w is\nw\n"),
        ("if x:\n    y\n    # that was y\nw\n", "if x:\n    y\n# that was y\n<w\n"),
        ("if x:\n    y\n# y is off\n    z\n", "if x:\n    y\n|# y is off\nz\n"),
        ("if x:\n    y\n  # both\n  # off\n\n    z\n", "if x:\n    y\n|  # both\n|  # off\n\nz\n"),
        # Lines of blanks alone.
        ("if x:\n    y\n    \n      \n  \n    z\n", "if x:\n    y\n|    \n  \n|  \nz\n"),
        ("if x:\n    y\n    ", "if x:\n    y\n|    "),
        ("if x:\n    ", "if x:\n    "),
        # Columns that no block has, and signs in the text.
        ("if x:\n        y\n    z\nw\n", "if x:\n        y\n<    z\n<w\n"),
        ("a\n    \x0fb\n    c\x0f\x10\n", "a\n|    \x0fb\n    c\x0f\x10\n".replace("\x0f", "<").replace("\x10", "|")),
    ],
)  # fmt: skip
def test_what_is_said(text: str, form: str) -> None:
    assert shown(text) == form


def test_signs_that_mean_nothing_do_no_harm() -> None:
    def written(form: str) -> str:
        return Layout().write(form.replace("<", "\x0f").replace("|", "\x10").encode()).decode()

    assert written("<<<a\n<b") == "a\nb"  # nothing is left to end
    assert written("a:\n    b\n<\n\nc") == "a:\n    b\n\n\nc"  # in front of empty lines
    assert written("a<b|c") == "a\x0fb\x10c"  # within a line
    assert written("a:\n    b\n||c") == "a:\n    b\n\x10c"
    assert written("a:\n    b\n|<c\nd") == "a:\n    b\n\x0fc\n    d"


def test_depth_costs_nothing() -> None:
    """The form of a function is the same wherever it stands."""
    for name, content in library(20):
        text = content.decode("utf-8", "replace")
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and not node.decorator_list:
                own = "".join(text.splitlines(keepends=True)[node.lineno - 1 : node.end_lineno])
                lines = own.splitlines()
                if any(line.strip() and line[:1] in "#\\\t" for line in lines) or "'''" in own or '"""' in own:
                    continue  # such lines would stand elsewhere, too
                deeper = "class A:\n    class B:\n" + textwrap.indent(own, " " * 8)
                assert said(deeper) == b"class A:\n    class B:\n    " + said(own), (name, node.name)


def test_blocks_are_those_of_python() -> None:
    """At each first line of a statement there are as many levels as Python's own tokenizer counts."""
    checked = 0
    for name, content in library(40):
        if b"\t" in content or b"\x0c" in content:
            continue
        tokens = list(tokenize.tokenize(io.BytesIO(content).readline))
        depth, depths, begins = 0, dict[int, int](), True
        for token in tokens:
            if token.type in (tokenize.INDENT, tokenize.DEDENT):
                depth += 1 if token.type == tokenize.INDENT else -1
            elif token.type == tokenize.NEWLINE:
                begins = True
            elif begins and token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER):
                depths[token.start[0]], begins = depth, False
        nesting, found = Nesting(), dict[int, int]()
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            if nesting.is_outside and line.strip()[:1] not in (b"", b"#"):
                found[number] = -1
            nesting.read_any(line)
        layout, form = Layout(), said(content)
        for number, line in enumerate(form.splitlines(keepends=True), 1):
            at = len(line) - len(line.lstrip(DEDENT + IN_FULL + b" \t")) + 1
            layout.write(line[:at])
            if number in found:
                found[number] = levels(layout)
            layout.write(line[at:])
        assert found == depths, name
        checked += len(found)
    assert checked > 1000


def levels(layout: Layout) -> int:
    count, level = 0, layout.level
    while level[1] is not None:
        count, level = count + 1, level[1]
    return count


def test_nothing_grows_without_bound() -> None:
    """A model that indents further with every line is not given a text that is larger by orders of magnitude."""
    form = b"if x:\n    " * 2000
    layout = Layout()
    assert len(layout.write(form)) <= len(form) + 2000 * WIDEST
    assert len(layout.waiting) <= WIDEST
    text = b"".join(b" " * n + b"if x:\n" for n in range(0, 600, 3))
    assert Layout().write(said(text)) == text
    wide = b"a\n" + b" " * (WIDEST + 1) + b"b\nc\n"
    assert said(wide) == wide


def test_long_texts_take_time_in_proportion() -> None:
    """Each of these would take hours if something were looked at again for each character."""
    for text in (b"(" * 20_000, b"a" * 400_000, b"#\n" * 10_000, b" # c\n" * 10_000 + b"x", b" " * 40_000,
                 b"'" * 20_000, b"\\" * 20_000, b"{" * 9_999 + b"}" * 9_999, b"f'{" * 5_000,
                 b"\r" * 10_000):  # fmt: skip
        assert Layout().write(said(text)) == text


# ---------------------------------------------------------------- what is open


@settings(max_examples=600, deadline=None)
@given(CODE | st.binary(max_size=60), CUTS, st.sampled_from(["'", '"', "{", "N{", "}", "\n", "x", "\\", "f'{"]))
def test_what_can_not_open_or_close_anything_may_be_passed_over(text: bytes, cuts: list[int], behind: str) -> None:
    slow, fast = Nesting(), Nesting()
    for byte in text:
        slow.read(bytes([byte]))
    for piece in pieces(text, cuts):
        fast.read_any(piece)
    for byte in (behind + "\"'{\n}\n").encode():
        slow.read(bytes([byte]))
        fast.read(bytes([byte]))
        assert slow._open == fast._open
        assert byte != ord("\n") or slow.is_outside == fast.is_outside


def test_a_copy_goes_on_by_itself() -> None:
    first = Layout()
    first.write(b"if x:\n    f(")
    other = first.copy()
    assert first.write(b")\ny") == b")\n    y"
    assert other.write(b"a,\n    b)\n\x0fz") == b"a,\n        b)\nz"
    assert first.write(b"\n\x0fw") == b"\nw"
