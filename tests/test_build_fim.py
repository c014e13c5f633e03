"""What `dsjax data build` makes of texts: fill-in-the-middle, marked text, pairs."""

from __future__ import annotations

import ast
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import UserError
from dsjax.data.build.fim import (
    Cut,
    Fim,
    FimTokens,
    arranged,
    cut_characters,
    cut_node,
    fill_in_the_middle,
    fim_window,
    undone,
)
from dsjax.data.build.pairs import pairs_of
from dsjax.data.build.write import path_comment
from dsjax.data.marked import Marked, encode, parse_marked
from dsjax.data.tokenizer import train_tokenizer

# ---------------------------------------------------------------- fill-in-the-middle

TEXT = st.text(alphabet="ab \n():=é😀\r\t", max_size=60)
PYTHON = st.sampled_from(
    [
        "x = 1\n",
        "@decorated(é='ü')\nclass A(B):\n    '''doc é'''\n    def f(self, x=3, *a):\n"
        "        return [y for y in x if y] + f'{x!r:>{3}} é'\n",
        "# only a comment after\n\nfor i in range(3):\n    print('😀', i)  # 😀\n\n\n# the end",
        "async def f():\n\tawait g()\nmatch x:\n\tcase [1, *_]:\n\t\tpass\n",
        "lambda: (yield)\nwith open('x') as f, g: pass\ntry:\n    a[b:c].d += 1\nexcept (E, F) as e: raise\n",
    ]
)


@settings(max_examples=200, deadline=None)
@given(st.one_of(TEXT, PYTHON), st.integers(0, 2**32), st.sampled_from(["psm", "spm"]))
def test_cuts_can_be_put_together_again(text: str, seed: int, order) -> None:
    draw = random.Random(seed)
    for cut in (cut_characters(text, draw), cut_node(text, draw)):
        if cut is not None:
            assert cut.prefix + cut.middle + cut.suffix == text
            marked = arranged(cut, order, FimTokens())
            assert undone(marked) == text
            assert [marked.text[a:b] for a, b in marked.special] == list(FimTokens().names)
            assert marked.text.endswith(cut.middle)


@settings(max_examples=200, deadline=None)
@given(PYTHON, st.integers(0, 2**32))
def test_the_middle_is_a_node(text: str, seed: int) -> None:
    cut = cut_node(text, random.Random(seed))
    assert cut is not None
    segments = set()
    for node in ast.walk(ast.parse(text)):
        if hasattr(node, "lineno"):
            segment = ast.get_source_segment(text, node) or ""
            segments.add(segment)
            for decorator in getattr(node, "decorator_list", [])[:1]:
                segments.add("@" + (ast.get_source_segment(text, decorator) or "") + "\n" + segment)
    assert cut.middle in segments
    assert cut.middle


def test_every_node_comes_up() -> None:
    text = "def f(a):\n    return g(a) + 1\n"
    found = {cut_node(text, random.Random(i)).middle for i in range(400)}  # type: ignore[union-attr]
    assert found == {text.rstrip(), "a", "return g(a) + 1", "g(a) + 1", "g(a)", "g", "1"}


def test_what_does_not_parse_has_no_nodes() -> None:
    for text in ("def f(:", "", "# nothing\n", "x = 1\r\ny = 2\r\n", "\ufeffx = 1\n", "x = '\0'"):
        assert cut_node(text, random.Random(0)) is None


def test_rates() -> None:
    text = "def f(a):\n    return g(a) + 1\n"
    cfg = Fim(rate=0.5, spm=0.25, nodes=0.5)
    done = [fill_in_the_middle(text, python=True, cfg=cfg, draw=random.Random(i))[1] for i in range(2000)]
    counts = {kind: done.count(kind) / 2000 for kind in set(done)}
    # standard deviation at most sqrt(0.25 / 2000) = 0.011; four of them
    for kind, share in {"as it is": 0.5, "psm, node": 0.1875, "psm, characters": 0.1875, "spm, node": 0.0625}.items():
        assert abs(counts[kind] - share) < 0.045
    spelt = "x = '<|fim_hole|>'\n"
    assert fill_in_the_middle(spelt, python=True, cfg=Fim(rate=1.0), draw=random.Random(0)) == (
        Marked(spelt),
        "as it is",
    )
    other = fill_in_the_middle("{ not python }", python=False, cfg=Fim(rate=1.0, nodes=1.0), draw=random.Random(0))
    assert other[1] == "psm, characters"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(0, 2**32), st.sampled_from([0.0, 0.5, 1.0]))
def test_packed_rows_are_cut_document_by_document(ids: list[int], seed: int, spm: float) -> None:
    """0 is the boundary; 10, 11, 12 are the tokens."""
    window = np.asarray(ids, np.int32)
    cfg = Fim(rate=1.0, spm=spm)
    out = fim_window(window, (10, 11, 12), end_id=0, cfg=cfg, draw=random.Random(seed))
    assert out.shape == window.shape
    assert out.dtype == np.int32
    assert (fim_window(window, (10, 11, 12), end_id=0, cfg=Fim(rate=0.0), draw=random.Random(seed)) == window).all()
    before, after = split_at(ids), split_at(out.tolist())
    assert len(after) <= len(before)
    for document, cut in zip(before, after[:-1], strict=False):  # the last may be cut short
        if document:
            begin, hole, end = cut.index(10), cut.index(11), cut.index(12)
            assert begin == 0
            assert cut[1:hole] + cut[end + 1 :] + cut[hole + 1 : end] == document
        else:
            assert cut == []


def split_at(ids: list[int]) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for i in ids:
        if i == 0:
            parts.append([])
        else:
            parts[-1].append(i)
    return parts


# ---------------------------------------------------------------- marked text


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(a):\n    return g(a) + 1\n"] * 3, 300, FimTokens().names)


def test_special_tokens_and_weights(tokenizer) -> None:
    marked = arranged(Cut("def f", "(a)", ":\n"), "psm", FimTokens())
    ids, weights = encode(marked, tokenizer)
    special = [tokenizer.special_ids[name] for name in FimTokens().names]
    parts = [tokenizer.encode(part).tolist() for part in ("def f", ":\n", "(a)")]
    assert ids.tolist() == [special[0], *parts[0], special[1], *parts[1], special[2], *parts[2]]
    assert weights.tolist() == [1.0] * len(ids)
    # the same text without spans is text
    plain, _ = encode(Marked(marked.text), tokenizer)
    assert not set(special) & set(plain.tolist())
    assert tokenizer.decode(plain) == marked.text
    ids, weights = encode(Marked("def f(a)", masked=((0, 5),)), tokenizer)
    assert weights.tolist() == [0.0] * len(tokenizer.encode("def f")) + [1.0] * len(tokenizer.encode("(a)"))
    assert encode(Marked(""), tokenizer)[0].shape == (0,)
    with pytest.raises(UserError, match="has no special token 'def'"):
        encode(Marked("def f", special=((0, 3),)), tokenizer)


def test_records_say_the_same() -> None:
    marked = Marked("abc", ((0, 1),), ((1, 3),))
    assert parse_marked(marked.record(other=1), "x") == marked
    assert Marked("abc").record() == {"text": "abc"}
    for record, said in (
        ({}, "x: 'text' must be a string, found NoneType"),
        ({"text": "abc", "special": [[0, 4]]}, "x: 'special' must be sorted spans"),
        ({"text": "abc", "masked": [[1, 2], [0, 1]]}, "x: 'masked' must be sorted spans"),
        ({"text": "abc", "masked": [[1, 1]]}, "x: 'masked' must be sorted spans"),
        ({"text": "abc", "masked": 3}, "x: 'masked' must be sorted spans"),
    ):
        with pytest.raises(UserError) as caught:
            parse_marked(record, "x")
        assert said in str(caught.value)


# ---------------------------------------------------------------- pairs and comments

CLASS = '''class A:
    """A class of its own."""

    @decorated
    def method(self, x):
        """Do what has to be done.

            Indented more.
        """
        # why
        text = """not
    moved"""
        return x

    def long_string(self):
        """Return a text of lines."""
        return """one
        two"""

    @decorated
    async def plain(self, x):
        """Do what has to be done.

            Indented more.
        """
        # why

        return [
            x,
        ]

    def stub(self):
        """Not yet written here."""
        raise NotImplementedError("later")

    def short(self):
        """Two words."""
        return 1

    def one(self): "All in one line."; return 1

if True:
    async def outer():
        """Hold an inner function."""
        def inner():
            """Do nothing but return."""
            return 1
        return inner
'''


def test_pairs() -> None:
    found = list(pairs_of(CLASS))
    # a string whose lines would change when a method is moved to the left is no pair, nor is a stub
    assert [p.name for p in found] == ["A.plain", "outer"]
    plain, outer = found
    doc = '    """Do what has to be done.\n\n        Indented more.\n    """\n'
    assert (plain.head, plain.body) == (
        f"async def plain(self, x):\n{doc}",
        "    # why\n\n    return [\n        x,\n    ]\n",
    )
    assert outer.head == 'async def outer():\n    """Hold an inner function."""\n'
    assert outer.body.startswith("    def inner():\n")
    for pair in found:
        (node,) = ast.parse(pair.head + pair.body).body
        assert ast.get_docstring(node)  # type: ignore[arg-type]
    assert not list(pairs_of("def f(:"))


def test_what_is_nested_too_deep_to_be_compared_is_no_pair() -> None:
    sum_of_many = " +\n".join(["ab"] * 1200)  # not indented, so that its lines can not be moved
    text = f'class A:\n    def f(self, ab):\n        """Add it many times."""\n        return (\n{sum_of_many})\n'
    assert ast.parse(text)
    assert not list(pairs_of(text))


def test_path_comments() -> None:
    assert path_comment("a/b.py") == "# a/b.py\n"
    assert path_comment("a.CPP") == "// a.CPP\n"
    assert path_comment("a.html") == "<!-- a.html -->\n"
    assert path_comment("a\nb.sql") == "-- a\\nb.sql\n"
    assert path_comment("\udcff") == "# \\udcff\n"
