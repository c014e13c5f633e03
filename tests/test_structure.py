"""The features of a text: what they say of it, that its prefix alone decides, and that no text makes them fail."""

from __future__ import annotations

import functools
import random
import re
import textwrap
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structure_cases import BYTES, Read, byte_features, in_range, library

from dsjax.data.structure.language import LANGUAGES, PYTHON
from dsjax.data.structure.scanner import Scanner
from dsjax.data.structure.vocabulary import Vocabulary
from dsjax.data.token_names import byte_level_bytes, marked_bytes
from dsjax.data.tokenizer import Tokenizer, train_tokenizer
from dsjax.nn.fields import COLUMN, FARTHEST, KIND, KINDS, LEAF, NUM_FIELDS, POINTERS

MODULE = textwrap.dedent(
    '''\
    import os.path as where
    @cached(size=1)
    class A(B):
        """Doc."""
        def f(self, a, *rest, key: int = {1: 2}) -> int:
            if a := g(1): return [x for x in a]
            else:
                total = lambda q, r=2: q
            for i, j in rest:
                self.seen = total
            return where, a

    last = 3
    '''
)


# ---------------------------------------------------------------- what they say


def test_blocks_brackets_and_statements_by_hand() -> None:
    text = Read(MODULE)
    got = text.behind("{")
    assert (got["kind"], got["kind_2"], got["kind_3"]) == ("braces", "parameters", "class")
    assert (got["statement"], got["depth"], got["brackets"], got["bracket"]) == ("def", 1, 2, None)
    assert text.behind("1", 1)["bracket"] == "{"
    got = text.behind("for", 0)  # in the comprehension
    assert (got["statement"], got["kind"], got["kind_2"], got["depth"]) == ("return", "list", "if", 3)
    assert got["block"] == "if"
    got = text.behind("total", 1)
    assert (got["kind"], got["kind_2"], got["statement"], got["block"]) == ("for", "def", "assignment", "for")
    assert text.behind("last")["depth"] == 0
    assert text.behind("last")["previous"] == "class"
    assert text.behind("3")["sibling"] == 3  # the class counts with its decorator


def test_a_line_that_has_only_begun_shows_the_blocks_that_its_indentation_leaves_open() -> None:
    text = Read("def f():\n    if a:\n        b\n    c\nd\n")
    ends = [i for i, piece in enumerate(text.pieces) if b"\n" in piece]
    kinds = [KINDS[k] for k in text.features[ends, COLUMN["kind"]]]
    assert kinds == ["def", "if", "def", "module", "module"]
    previous = [KINDS[k] for k in text.features[ends, COLUMN["previous"]]]
    assert previous == ["none", "none", "if", "def", "expression"]
    assert text.features[ends, COLUMN["depth"]].tolist() == [1, 2, 1, 0, 0]


def test_names_point_to_where_they_were_bound_last_and_can_be_seen() -> None:
    text = Read(MODULE)
    at = {i: text.pieces[i - int(back)] for i, back in enumerate(text.features[:, POINTERS["name"]]) if back}
    found = [(text.pieces[i].strip().decode(), i - int(text.features[i, POINTERS["name"]])) for i in at]
    where = {name: text.at(name) for name in ("where", "a", "x", "rest", "total", "self")}
    assert ("where", where["where"]) in found
    assert ("total", where["total"]) in found
    assert ("rest", where["rest"]) in found
    assert ("self", where["self"]) in found
    a_bound = [i for i, piece in enumerate(text.pieces) if piece.strip() == b"a"]
    assert ("a", a_bound[1]) in found  # by `:=`, behind the parameter
    assert not any(name == "last" for name, _ in found)  # it is bound, not used


@pytest.mark.parametrize(
    ("code", "bound"),
    [
        ("n = 1\ndef f():\n    n = 2\n\nn\n", 0),  # what a function binds is not seen behind it
        ("class A:\n    n = 1\n    def c(self):\n        return n\n", 0),
        ("a.n = 1\nb.n\n", 0),  # whose attribute it is nobody knows
        ("n = 1\na.n\n", None),  # an attribute is no variable
        ("import a.b as q, n\nn\n", 0),
        ("from a.n import b\nn\n", None),
        ("from a import (b, c as n)\nn\n", 0),
        ("for i, n in x:\n    n\n", 0),
        ("with a as n: n\n", 0),
        ("try: x\nexcept E as n: n\n", 0),
        ("n: int\nn\n", 0),
        ("a, n = b = 1, 2\nn\n", 0),
        ("n = 0\nn += 1\nn\n", 1),
        ("f(n=1)\nn\n", None),
        ("def f(a=1, n=2): n\n", 0),
        ("def f(a: n): n\n", None),
        ("n == 1\nn\n", None),
        ("def n(): n\n", 0),
        ("[n for n in x]\n", None),
    ],
)
def test_what_binds_a_name(code: str, bound: int | None) -> None:
    text = Read(code, pieces=re.findall(rb"\w+|\s+|[^\w\s]", code.encode()))
    uses = [i for i, piece in enumerate(text.pieces) if piece == b"n"]
    back = int(text.features[uses[-1], POINTERS["name"]])
    if bound is None:
        assert back == 0
    else:
        assert uses[-1] - back == uses[bound]


@pytest.mark.parametrize(
    ("code", "behind", "kinds"),
    [
        ("f'{a!r:>{w}}' + x", "x", ("module",)),
        ("f'{a!r:>{w}}' + x", "w", ("field", "field", "format")),
        ("f'{{a}} {b}'", "a", ("format", "module")),
        ("f'{{a}} {b}'", "b", ("field", "format", "module")),
        ("f'{x['a']}' + y", "y", ("module",)),  # quotes again, as from Python 3.12 on
        ("f'{f'{f'{z}'}'}' + y", "y", ("module",)),
        ("f'{f'{z}'}'", "z", ("field", "format", "field")),
        ('f"\\N{DASH} {b}"', "DASH", ("format", "module")),
        ("f'''{\n a  # }\n}''' + y", "y", ("module",)),
        ("f'{(lambda q: 1)}' + y", "y", ("module",)),
        ("rb'\\'' + y", "y", ("module",)),
        ("'a\nb", "b", ("module",)),  # nobody closed the string
        ("f'{a\ndef g(): pass", "g", ("module",)),  # nor the field
        ("x = (1, [2\ndef g(): pass", "g", ("module",)),
        ("if a:\n    x = f(1\n    return y", "y", ("if", "module")),
        ("x = ) + y", "y", ("module",)),
        ("(a, [b) + y", "y", ("module",)),
        ("if (a\n   and b): y", "y", ("if", "module")),
        ("if a \\\n   and b:\n  y", "y", ("if", "module")),
        ("match a:\n  case [b, c] if d: y", "y", ("case", "match", "module")),
        ("match = a\ny", "y", ("module",)),
        ("match[a]: int = y", "y", ("module",)),
        ("x: int = y", "y", ("module",)),
        ("async def f():\n  async with a as b: y", "y", ("with", "async_def", "module")),
        ("a = lambda: 1; y", "y", ("module",)),
        ("d = {lambda k: 1: 2, 3: y}", "y", ("braces", "module")),
        ("x[1:2, y]", "y", ("subscript", "module")),
        ("if a:\n\ty\n", "y", ("if", "module")),
        ("if a:\r\n  b\r\n  y\r\n", "y", ("if", "module")),
        ("if a:\n  # b\n\n  y", "y", ("if", "module")),
        ("while a: b; y", "y", ("while", "module")),
        ("if a: b\nelse: y", "y", ("else", "module")),
        ("class A: x = y", "y", ("class", "module")),
        ("print(*a, **y)", "y", ("call", "module")),
    ],
)
def test_open_nodes_by_hand(code: str, behind: str, kinds: tuple[str, ...]) -> None:
    text = Read(code, pieces=re.findall(rb"\w+|\s+|[^\w\s]", code.encode()))
    got = text.behind(behind, -1)
    assert (got["kind"], got["kind_2"], got["kind_3"])[: len(kinds)] == kinds
    if len(kinds) < 3:
        assert (got["kind"], got["kind_2"], got["kind_3"])[len(kinds)] == "none" or kinds[-1] != "module"


def test_what_stands_in_brackets_ends_with_its_statement_and_a_header_with_its_block() -> None:
    text = Read("def f(a):\n    b = g(c)\n    d\ne\n")
    floor = text.features[:, COLUMN["floor"]] - 1
    ends = {text.pieces[i]: int(value) for i, value in enumerate(floor) if value >= 0}
    # Level 2 is the function's body, level 0 the module; 3 and 1 are brackets of their statements.
    assert ends == {b"\n    ": 2, b"\n": 0, b"e": 0}


def test_a_brace_language_by_table_alone() -> None:
    code = textwrap.dedent(
        """\
        #define N {1, 2}
        static int f(int a, char *b) {
            int x[] = {1, 2}; /* } */
            for (int i = 0; i < a; i++) { if (b) x[i]++; else { y(); } }
            switch (a) { case 1: z(); default: break; }
            return w; // }
        }
        struct S { int v; } s;
        """
    )
    text = Read(code, "c", pieces=re.findall(rb"\w+|\s+|[^\w\s]", code.encode()))

    def nodes(piece: str, nth: int = 0) -> tuple[object, ...]:
        got = text.behind(piece, nth)
        return got["kind"], got["kind_2"], got["kind_3"]

    assert nodes("2", 0) == ("braces", "module", "none")
    assert nodes("a", 0) == ("call", "module", "none")
    assert nodes("2", 1) == ("braces", "def", "module")
    assert nodes("y") == ("else", "for", "def")
    assert nodes("z") == ("switch", "def", "module")
    assert nodes("w") == ("def", "module", "none")
    assert nodes("v") == ("class", "module", "none")
    assert nodes("s", -1) == ("module", "none", "none")
    assert text.scanner.unmatched == 0
    assert len(text.scanner.stack) == 1


# ---------------------------------------------------------------- on nothing but the prefix


@functools.cache
def tokenizer() -> Tokenizer:
    return train_tokenizer([content.decode("utf-8", "replace") for _, content in library(12)], 600)


@functools.cache
def first() -> Scanner:
    return Scanner(PYTHON, Vocabulary.of(tokenizer()))


@functools.cache
def files() -> list[tuple[list[int], np.ndarray]]:
    """Tokens of real files, and their features."""
    ids = [tokenizer().encode(content.decode("utf-8", "replace")).tolist() for _, content in library(12)]
    return [(tokens, features_of(tokens)) for tokens in ids]


def features_of(tokens: list[int]) -> np.ndarray:
    return first().copy().scan(tokens)


def some_tokens(size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 599), max_size=size)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_prefix_of_a_real_file_has_the_features_that_it_has_in_the_file(data: st.DataObject) -> None:
    tokens, whole = data.draw(st.sampled_from(files()))
    cut = data.draw(st.integers(0, len(tokens)))
    assert (features_of(tokens[:cut]) == whole[:cut]).all()


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_what_comes_behind_changes_nothing_before(data: st.DataObject) -> None:
    tokens, whole = data.draw(st.sampled_from(files()))
    cut = data.draw(st.integers(0, len(tokens)))
    suffix = data.draw(some_tokens(30))
    assert (features_of(tokens[:cut] + suffix)[:cut] == whole[:cut]).all()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_token_by_token_and_from_a_copy_is_the_same_as_at_once(data: st.DataObject) -> None:
    tokens, whole = data.draw(st.sampled_from(files()))
    start = data.draw(st.integers(0, len(tokens) - 1))
    scanner = first().copy()
    scanner.scan(tokens[:start])
    other = scanner.copy()
    other.scan(data.draw(some_tokens(20)))  # goes another way
    got = [scanner.feed(token) for token in tokens[start : start + 60]]
    assert (np.array(got) == whole[start : start + 60]).all()


_SNIPPETS = st.sampled_from(
    ["f'", 'f"""', "{", "}", "(", ")", "[", "]", ":", ":=", "=", "\\", "\n", "\r\n", "\r", "    ", "\t", "#", "'", '"',
     '"""', "def ", "class ", "if ", "else", "match ", "case ", "async ", "lambda ", "for ", "in ", "import ", "x",
     ".y", "1", "@", ";", ",", "!r", "\\N{", "rb'", "é", "深", "\x00", "\x0c", "\ufeff", "return", "/*", "*/", "//",
     "type "]
)  # fmt: skip


@settings(deadline=None, max_examples=400)
@given(st.lists(_SNIPPETS, max_size=40).map("".join) | st.text(max_size=60), st.sampled_from(sorted(LANGUAGES)))
def test_no_text_makes_it_fail_and_tokens_may_cut_it_anywhere(text: str, language: str) -> None:
    content = text.encode("utf-8", "surrogatepass")
    by_byte = byte_features(content, language)
    assert in_range(by_byte)
    cuts = sorted(random.Random(len(content)).choices(range(len(content) + 1), k=5))
    pieces = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True) if a < b]
    got = Read(content, language, pieces=pieces).features if pieces else by_byte
    ends = np.cumsum([len(piece) for piece in pieces], dtype=int) - 1
    same = [name for name in COLUMN if name not in (*POINTERS, "floor")]  # those count tokens
    for name in same:
        assert (got[:, COLUMN[name]] == by_byte[ends, COLUMN[name]]).all(), name


@settings(deadline=None, max_examples=200)
@given(st.lists(st.binary(min_size=1, max_size=5), max_size=30), st.sampled_from(sorted(LANGUAGES)))
def test_tokens_of_any_bytes(pieces: list[bytes], language: str) -> None:
    vocabulary = Vocabulary([*pieces, b""])
    features = Scanner(LANGUAGES[language], vocabulary).scan([*range(len(pieces) + 1), 10**6])
    assert in_range(features)
    assert (features[-2:, COLUMN["leaf"]] == LEAF["special"]).all()


def test_broken_real_files_never_fail_and_always_come_back() -> None:
    rng = random.Random(0)
    for _, content in library(12):
        text = bytearray(content[:20_000])
        for _ in range(30):
            at = rng.randrange(len(text))
            text[at : at + rng.choice((0, 1, 3))] = rng.choice((b"(", b'"""', b"{", b"\n", b"'", b"]", b"f'{", b""))
        assert in_range(byte_features(bytes(text)))


def test_depths_beyond_the_tables_count_as_the_deepest() -> None:
    lines = "".join("  " * depth + "if a:\n" for depth in range(40)) + "  " * 40 + "f(" + "(" * 50 + "x"
    text = Read(lines)
    assert in_range(text.features)
    assert text.behind("x")["depth"] == 15
    assert text.behind("x")["brackets"] == 7
    far = Read("x = 1\n" + "y\n" * (FARTHEST // 2 + 2) + "x\n")
    assert far.features[-2, POINTERS["name"]] == 0


LONG = {
    "name": (b"a", 100),
    "blanks": (b" ", 100),
    "brackets": (b"(", 10, b"]", 10),
    "fields": (b"f'{", 1, b")", 10),
    "lambdas": (b"lambda ", 10),
    "backslashes": (b"\\", 100),
}


@pytest.mark.parametrize("name", LONG)
def test_no_text_takes_more_than_its_length_in_time(name: str) -> None:
    def seconds(scale: int) -> float:
        what = LONG[name]
        text = b"".join(piece * count * scale for piece, count in zip(what[::2], what[1::2], strict=True))
        pieces = [text[i : i + 20] for i in range(0, len(text), 20)]
        begin = time.process_time()
        assert in_range(Read(text, pieces=pieces).features)
        return time.process_time() - begin

    # What is quadratic takes 16 times as long; the machine may have other things to do for a while.
    assert any(seconds(2_000) < 8 * seconds(500) for _ in range(3))


# ---------------------------------------------------------------- special tokens, and a text with a hole


HOLE = Vocabulary([*BYTES.texts, b"", b"", b"", b""], hole=(257, 258, 259))
END, BEGIN, MIDDLE_HERE, MIDDLE = 256, 257, 258, 259


def test_the_token_between_documents_begins_a_new_one() -> None:
    one, two = b"def f(:\n  if x", b"y = (1,\n"
    scanner = Scanner(PYTHON, HOLE)
    got = scanner.scan([END, *one, END, *two])
    assert (got[1 : len(one) + 1] == byte_features(one)).all()
    assert (got[len(one) + 2 :] == byte_features(two)).all()
    assert got.shape[1] == NUM_FIELDS
    assert KIND["module"] == got[0, COLUMN["kind"]] == got[len(one) + 1, COLUMN["kind"]]


@pytest.mark.parametrize("order", ["prefix first", "suffix first"])
def test_the_middle_goes_on_behind_the_prefix_and_knows_what_the_suffix_closes(order: str) -> None:
    prefix, middle, suffix = b"def f(a):\n    return g(a, [", b"1, 2", b"], 3)\n\nx = h()\n"
    alone = byte_features(prefix + middle)
    scanner = Scanner(PYTHON, HOLE)
    if order == "prefix first":
        got = scanner.scan([BEGIN, *prefix, MIDDLE_HERE, *suffix, MIDDLE, *middle])
    else:
        got = scanner.scan([BEGIN, MIDDLE_HERE, *suffix, MIDDLE, *prefix, *middle])
    here = got[-len(middle) :]
    balance, pointers = COLUMN["balance"], list(POINTERS.values())
    same = [column for column in range(NUM_FIELDS) if column != balance and column not in pointers]
    assert (here[:, same] == alone[-len(middle) :][:, same]).all()
    assert (alone[:, balance] == 0).all()
    assert (here[:, balance] == 9).all()  # two brackets are open, and the suffix closes two
    assert [row[balance] for row in scanner.scan(b"(]")] == [10, 8]  # `]` closes what was opened in its bracket, too


def test_a_hole_in_the_order_of_a_text_points_across_the_suffix() -> None:
    prefix, middle = b"abc = 1\n", b"abc"
    got = Scanner(PYTHON, HOLE).scan([BEGIN, *prefix, MIDDLE_HERE, *b"x\n", MIDDLE, *middle])
    last = len(got) - 1
    assert last - got[last, POINTERS["name"]] == 1  # where `abc` begins, behind the first special token


# ---------------------------------------------------------------- vocabularies


def test_the_bytes_of_tokens_are_those_of_the_text() -> None:
    text = "def f(é, 深):\n    return '😀' + \"\\x00\"\r\n\t#"
    vocabulary = Vocabulary.of(tokenizer())
    assert b"".join(vocabulary.texts[i] for i in tokenizer().encode(text)) == text.encode()
    assert vocabulary.texts[tokenizer().end_id] == b""
    assert vocabulary.hole == (-1, -1, -1)


def test_how_tokenizers_spell_bytes() -> None:
    assert [byte_level_bytes(name) for name in ("Ġdef", "Ċ", "<0x0A>", "深")] == [
        b" def",
        b"\n",
        b"<0x0A>",
        "深".encode(),
    ]
    assert [marked_bytes(name) for name in ("▁if", "<0x0A>", "é")] == [b" if", b"\n", "é".encode()]


def test_tokens_around_a_hole_are_found_by_their_names() -> None:
    names = ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>")
    with_hole = train_tokenizer(["a = 1"], 300, names)
    assert Vocabulary.of(with_hole).hole == tuple(with_hole.special_ids[name] for name in names)
