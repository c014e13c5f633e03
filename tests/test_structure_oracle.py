"""On real files the scanner, which sees no token ahead, finds open what tree-sitter finds with the whole file."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator

import pytest
from structure_cases import library

from dsjax.data.structure.language import PYTHON
from dsjax.data.structure.scanner import Scanner
from dsjax.data.structure.vocabulary import Vocabulary

tree_sitter = pytest.importorskip("tree_sitter")
tree_sitter_python = pytest.importorskip("tree_sitter_python")

# What has a block, and in which field; clauses are nodes of their own.
BLOCKS = {
    "function_definition": "def",
    "class_definition": "class",
    "if_statement": "if",
    "elif_clause": "elif",
    "else_clause": "else",
    "for_statement": "for",
    "while_statement": "while",
    "with_statement": "with",
    "try_statement": "try",
    "except_clause": "except",
    "except_group_clause": "except",
    "finally_clause": "finally",
    "match_statement": "match",
    "case_clause": "case",
}
STATEMENTS = {
    "assignment": "assignment",
    "augmented_assignment": "assignment",
    "return_statement": "return",
    "import_statement": "import",
    "import_from_statement": "from",
    "future_import_statement": "from",
    "raise_statement": "raise",
    "assert_statement": "assert",
    "delete_statement": "del",
    "global_statement": "global",
    "nonlocal_statement": "nonlocal",
    "pass_statement": "pass",
    "break_statement": "break",
    "continue_statement": "continue",
    "decorator": "decorator",
    **BLOCKS,
}


@dataclasses.dataclass(frozen=True)
class Open:
    """What is open behind a token: blocks and brackets, each with the byte that it, or its header, begins at."""

    blocks: tuple[tuple[str, int], ...]
    brackets: tuple[int, ...]
    statement: str


def leaves(content: bytes) -> Iterator[tuple[int, int, Open]]:
    """(begin, end, what is open there) of each token of the code, strings' contents and comments left out."""
    tree = tree_sitter.Parser(tree_sitter.Language(tree_sitter_python.language())).parse(content)
    if tree.root_node.has_error:
        return
    brackets: list[int] = []

    def walk(node, blocks: tuple[tuple[str, int], ...], statement: str):
        kind = BLOCKS.get(node.type)
        if node.type in STATEMENTS:
            statement = STATEMENTS[node.type]
            if node.type == "function_definition" and node.children[0].type == "async":
                statement = kind = "async_def"
        elif node.type == "block":
            statement = ""
        for child in node.children:
            inside = blocks
            if child.type == "block" and kind is not None:
                inside = (*blocks, (kind, node.start_byte))
            if child.child_count and child.type not in ("string_content", "line_continuation"):
                yield from walk(child, inside, statement)
            elif child.type not in ("comment", "string_content", "string_start", "string_end", "line_continuation"):
                if child.type in ("(", "[", "{"):
                    brackets.append(child.start_byte)
                elif child.type in (")", "]", "}"):
                    brackets.pop()
                if child.end_byte > child.start_byte:
                    yield child.start_byte, child.end_byte, Open(inside, tuple(brackets), statement)

    yield from walk(tree.root_node, (), "")


def scanned(content: bytes, ends: list[int]) -> Iterator[Open]:
    """What the scanner finds open behind each of ``ends``."""
    cuts = sorted({0, *ends, *starts_of_lexemes(content), len(content)})
    pieces = [content[a:b] for a, b in itertools.pairwise(cuts)]
    scanner = Scanner(PYTHON, Vocabulary(pieces))
    wanted = set(ends)
    for number, end in enumerate(cuts[1:]):
        scanner.scan([number])
        if end in wanted:
            blocks = tuple((n.kind, cuts[n.at]) for n in scanner.stack[1:] if n.column is not None)
            brackets = tuple(cuts[n.at] for n in scanner.stack if n.closer)
            yield Open(blocks, brackets, scanner.statement)


def starts_of_lexemes(content: bytes) -> Iterator[int]:
    """Where words and signs begin, so that what is open can be named by the byte that it begins at."""
    before = b" "
    for place in range(len(content)):
        byte = content[place : place + 1]
        if not (byte.isalnum() or byte == b"_" or byte >= b"\x80") or not (
            before.isalnum() or before == b"_" or before >= b"\x80"
        ):
            yield place
        before = byte


def agreement(files: tuple[tuple[str, bytes], ...]) -> tuple[collections.Counter[str], list[str]]:
    """Of all tokens: how many there are, and how many have the same blocks, brackets and statement."""
    counts: collections.Counter[str] = collections.Counter()
    differ = []
    for name, content in files:
        wanted = {end: (begin, found) for begin, end, found in leaves(content)}
        for end, got in zip(sorted(wanted), scanned(content, sorted(wanted)), strict=True):
            begin, want = wanted[end]
            same = {
                "blocks": got.blocks == want.blocks,
                "brackets": got.brackets == want.brackets,
                # Told when its first word has ended, behind `async` the second; that it assigns, behind the sign.
                "statement": not want.statement
                or got.statement in (want.statement, "none")
                or (want.statement, got.statement) == ("assignment", "expression")
                or (content[begin:end] in (b"def", b"for", b"with") and got.statement == "expression"),
            }
            counts["tokens"] += 1
            counts.update(part for part, right in same.items() if right)
            if not all(same.values()):
                line = content.count(b"\n", 0, begin) + 1
                differ.append(f"{name}:{line}: {content[begin:end]!r}: {[k for k, v in same.items() if not v]}")
    return counts, differ


def test_open_blocks_and_brackets_are_those_of_the_tree() -> None:
    counts, differ = agreement(library(20, 30_000))
    assert counts["tokens"] > 15_000
    assert counts["blocks"] == counts["tokens"], differ[:5]
    assert counts["brackets"] == counts["tokens"], differ[:5]
    assert counts["statement"] >= 0.999 * counts["tokens"], differ[:5]


HARD = '''\
import os; x = 1; y = (2,
  3)
if x: pass; y = 2
elif y: z = {1: [2]}
else: z = lambda a, *b: {a: b}
class A: x: int = 3
async def f(a: int = {1: 2}[1], *, b=lambda c: (c)) -> dict[str, int]:
    async with a as b, (c) as d:
        await x
    async for i in [i async for i in x if i]:
\tyield i
    else:
        return
    @property
    def g(self): return f"{self!r:>{x['a']}} {{no}} {f'{y}'}" 'a' """
  not: code (
"""
    try: x
    except* E as e: x = [y
  for y in z]
    finally:
        # comment

        x = y \\
            + z
match a, b:
    case [1, {"k": v}] if v: pass
    case A(x=1) | _:
        print(1 if x else 2, *a, **b)
while (n := f()):
    global q
    del x[1:2, ::3]
    assert x, "y"
    raise E from None
x = 3 if y else 4
print >> x
'''


def test_what_files_seldom_have() -> None:
    counts, differ = agreement((("hard", HARD.encode()), ("crlf", HARD.replace("\n", "\r\n").encode())))
    assert counts["tokens"] > 500
    assert not differ, differ[:10]
