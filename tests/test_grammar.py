"""The grammar is Python's: what it takes as a whole, ``ast.parse`` takes, and every real file is taken."""

from __future__ import annotations

import ast
import functools
import pathlib
import random
import re
import sysconfig
import warnings

import pytest
from grammar_cases import REFUSED, TAKEN
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.infer.grammar.constraint import parses
from dsjax.infer.grammar.lr import Automaton, read_rules
from dsjax.infer.grammar.reader import MOST_BRACKETS, MOST_DEEP, MOST_INDENTS, Reader

LIBRARY = pathlib.Path(sysconfig.get_path("stdlib"))
PIECE = re.compile(r"\w+|\s+|[^\w\s]")


@functools.cache
def reader() -> Reader:
    return Reader()


def takes(text: str | bytes) -> bool:
    place = reader().read(reader().start, text.encode() if isinstance(text, str) else text)
    return place is not None and reader().is_whole(place)


def python_takes(text: str) -> bool:
    """Without a warning."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ast.parse(text, feature_version=(3, 11))
    except (SyntaxError, ValueError, MemoryError, RecursionError, Warning):
        return False
    return True


def library_files() -> list[pathlib.Path]:
    """The files of the standard library that are UTF-8 and in the language of 3.11, in random order."""
    files = sorted(p for p in LIBRARY.rglob("*.py") if not {"site-packages", "dist-packages"} & set(p.parts))
    random.Random(0).shuffle(files)
    return files


def library_text(path: pathlib.Path) -> str | None:
    """None: ``ast.parse`` does not take it, or warns."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        return None
    return text if python_takes(text) else None


# ---------------------------------------------------------------- against ast.parse


def test_what_python_refuses_is_refused() -> None:
    assert len(set(REFUSED)) > 450
    assert not [text for text in REFUSED if python_takes(text)]
    assert not [text for text in REFUSED if takes(text)]


def test_unusual_python_is_taken() -> None:
    assert not [text for text in TAKEN if not python_takes(text)]
    assert not [text for text in TAKEN if not takes(text)]


def check_files(files: list[pathlib.Path], least: int) -> None:
    """Each is taken byte by byte, whole, and from no beginning of it is there no way to the end."""
    rng, num_taken = random.Random(1), 0
    for path in files:
        text = library_text(path)
        if text is None:
            continue
        content, num_taken = text.encode(), num_taken + 1
        place = reader().read(reader().start, content)
        assert place is not None, f"{path}: refused at byte {reader().stop(reader().start, content)}"
        assert reader().is_whole(place), path
        cut = rng.randrange(len(content) + 1) if content else 0
        begun = reader().read(reader().start, content[:cut])
        assert begun is not None, f"{path}: its first {cut} bytes are refused"
        ended = content[:cut] + reader().ending(begun)
        assert parses(ended), f"{path}: its first {cut} bytes, with the end {ended[cut:]!r}"
        if reader().automaton.num_nodes > 300_000:
            reader().forget()
    assert num_taken >= least


def test_files_of_the_standard_library_are_taken() -> None:
    files = [path for path in library_files() if path.stat().st_size < 20_000]
    check_files(files[:60], 40)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_all_files_of_the_standard_library_are_taken(part: int) -> None:
    check_files(library_files()[part::8], 60)


@functools.cache
def statements() -> list[str]:
    """Short statements of the standard library, those inside others, too."""
    found = []
    for path in library_files()[:40]:
        if (text := library_text(path)) is None:
            continue
        lines = text.splitlines(keepends=True)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.stmt) and (node.end_lineno or 0) - node.lineno < 6:
                own = lines[node.lineno - 1 : node.end_lineno]
                margin = node.col_offset
                found.append("".join(line[margin:] if not line[:margin].strip() else line for line in own))
    return found


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_statement_with_pieces_exchanged_is_taken_if_python_takes_it(data: st.DataObject) -> None:
    """The mutations are small, so that about a third is still Python; no disagreement was seen in 50,000."""
    rng = data.draw(st.randoms(use_true_random=False))
    words = [
        *"()[]{}:;,.=*@!'\"\\#",
        "lambda",
        "not",
        "for",
        "if",
        "match",
        "case",
        "_",
        "**",
        ":=",
        "f'",
        "b'",
        "1j",
        "\n  ",
    ]
    pieces = PIECE.findall(rng.choice(statements()))
    for _ in range(rng.choice([1, 1, 2, 3])):
        at = rng.randrange(len(pieces))
        other = rng.choice(words) if rng.random() < 0.5 else rng.choice(PIECE.findall(rng.choice(statements())))
        pieces[at : at + rng.randrange(2)] = [other] if rng.random() < 0.7 else []
        if not pieces:
            return
    text = "".join(pieces)
    if takes(text):
        assert python_takes(text), text
    elif python_takes(text):  # what is left out on purpose
        left_out = (r"\\[^\n]", r"\\\n", "[rR][fF]|[fF][rR]?['\"]")
        assert any(re.search(what, text) for what in left_out), text


# ---------------------------------------------------------------- ends


def test_each_beginning_of_a_program_has_a_way_to_its_end() -> None:
    for text in map(str.encode, TAKEN):
        place = reader().start
        for size in range(len(text)):
            moved = reader().read(place, text[size : size + 1])
            assert moved is not None, text[: size + 1]
            place = moved
            ended = text[: size + 1] + reader().ending(place)
            assert takes(ended), (text[: size + 1], ended)
            assert parses(ended), (text[: size + 1], ended)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
def test_from_wherever_a_text_is_there_is_a_short_way_to_its_end(seed: int, length: int) -> None:
    rng, text, place = random.Random(seed), b"", reader().start
    likely = (
        b" \n\t()[]{}:,.='\"#\\" * 3 + bytes(range(256)) + b"fbr_x0" * 4 + b"if for def match case lambda with \n    "
    )
    while len(text) < length:
        byte = bytes([rng.choice(likely)])
        if (moved := reader().read(place, byte)) is not None:
            text, place = text + byte, moved
    end = reader().ending(place)
    assert takes(text + end)
    assert parses(text + end), (text, end)
    assert len(end) <= 200


def test_nesting_ends_before_it_is_too_deep_for_python() -> None:
    """The deepest texts that are taken parse, and each still ends."""
    start = reader().start
    deepest = {
        b"(": MOST_BRACKETS + 1, b"[": MOST_BRACKETS + 1, b"{1:": MOST_BRACKETS + 1, b"f(": MOST_BRACKETS + 1,
        b"not ": MOST_DEEP, b"-": MOST_DEEP, b"lambda: ": MOST_DEEP, b"x if y else ": MOST_DEEP,
        b"(lambda: not -": MOST_BRACKETS + 1, b"x[lambda x=": MOST_BRACKETS + 1,
    }  # fmt: skip
    for opener, most in deepest.items():
        place, count = start, 0
        while (moved := reader().read(place, opener)) is not None:
            place, count = moved, count + 1
            assert count <= most
        assert count >= 32
        assert parses(opener * count + reader().ending(place)), (opener, count)
    text = b""
    for depth in range(MOST_INDENTS):
        text += b" " * depth + (b"while x:\n" if depth % 2 else b"def f(x):\n")
    assert reader().read(start, text) is not None
    assert reader().read(start, text + b" " * MOST_INDENTS + b"if x:\n") is None
    deep = reader().read(start, text + b" " * MOST_INDENTS + b"match x:\n")
    assert deep is not None
    assert parses(text + b" " * MOST_INDENTS + b"match x:\n" + reader().ending(deep))


# ---------------------------------------------------------------- the automaton


def test_an_ambiguous_grammar_is_followed_in_all_its_ways() -> None:
    """By hand: sums of a and b, where "a b" may also be one word; so "a b" in front of "!" needs the word."""
    automaton = Automaton(read_rules("s: e END | w ! END\ne: t | e + t\nt: a | b | w\nw: a b"), "s")

    def after(tokens: str) -> int:
        stacks = (automaton.root,)
        for token in tokens.split():
            stacks = tuple(n for node in stacks for n in automaton.after(node, token)[0])
        return len(stacks)

    assert [after(t) for t in ("a", "a b", "a b !", "a b ! END", "a + b END", "b END")] == [1, 1, 1, 1, 1, 1]
    assert [after(t) for t in ("+", "a !", "b a", "a b b", "a + b !", "END")] == [0] * 6
    plus = automaton.root
    for token in ("a", "+"):
        (plus,) = automaton.after(plus, token)[0]
    assert automaton.ending(plus)[1] in (("a", "END"), ("b", "END"))
