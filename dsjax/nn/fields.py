"""What is known of the syntax around a token: the names and sizes of its features, the same for every language.

A feature is a small whole number. A list of names only grows at its end, so that trained tables keep their meaning.
"""

from __future__ import annotations

# Nodes of the tree that are open at a token, and statements.
# fmt: off
KINDS = (
    "none", "module",
    # statements that open a block; the block has the same kind
    "class", "def", "async_def", "if", "elif", "else", "for", "while", "with", "try", "except", "finally", "match",
    "case", "switch", "do", "block",
    # brackets
    "parens", "call", "parameters", "bases", "list", "subscript", "braces", "lambda", "format", "field",
    # other statements
    "expression", "assignment", "string", "decorator", "return", "yield", "import", "from", "raise", "assert", "del",
    "global", "nonlocal", "pass", "break", "continue", "type", "goto", "typedef", "directive",
)

# What a token ends in or behind.
LEAVES = (
    "none", "special", "newline", "line", "name", "number", "string", "format", "string_end", "comment",
    # words of a language
    "and", "as", "assert", "async", "await", "break", "case", "class", "continue", "def", "del", "elif", "else",
    "except", "False", "finally", "for", "from", "global", "if", "import", "in", "is", "lambda", "match", "None",
    "nonlocal", "not", "or", "pass", "raise", "return", "True", "try", "type", "while", "with", "yield", "keyword",
    # signs
    "(", ")", "[", "]", "{", "}", ",", ";", ":", ".", "=", ":=", "->", "@", "*", "**", "sign", "operator", "compare",
    "augmented", "...", "other",
)
# fmt: on

KIND = {name: number for number, name in enumerate(KINDS)}
LEAF = {name: number for number, name in enumerate(LEAVES)}

# Where `return` and `await` may stand (0 to 3), and behind it (4 to 7) whether `break` may.
DEFINITIONS = ("module", "class", "def", "async_def")

DEPTHS, BRACKETS, PLACES = 16, 8, 16  # larger numbers count as the largest
BALANCES = 17  # 0: not known; else 9 + brackets that are open - brackets that a known suffix closes, within 8

# name -> how many values. These have embeddings ...
CATEGORIES: dict[str, int] = {
    "leaf": len(LEAVES),  # what the token ends in
    "statement": len(KINDS),  # the statement that it stands in; none: between two
    "kind": len(KINDS),  # the innermost open node: a block or a bracket
    "kind_2": len(KINDS),  # the node around that
    "kind_3": len(KINDS),  # and the one around that
    "previous": len(KINDS),  # the statement before, in the same block
    "definition": 2 * len(DEFINITIONS),
    "depth": DEPTHS,  # open blocks
    "brackets": BRACKETS,  # open brackets within the innermost block
    "sibling": PLACES,  # number of the statement in its block
    "item": PLACES,  # commas since the innermost bracket opened
    "place": PLACES,  # words and signs since the statement began
    "balance": BALANCES,
}
# ... this one says what has ended (see `closes` in dsjax.nn.structure), ...
FLOOR = len(CATEGORIES)
# ... and these point: so many tokens back; 0: nowhere.
POINTERS: dict[str, int] = {name: FLOOR + 1 + n for n, name in enumerate(("block", "bracket", "name"))}

NUM_FIELDS = FLOOR + 1 + len(POINTERS)
FARTHEST = 2**15 - 1  # a pointer that goes farther back is none
COLUMN = {name: number for number, name in enumerate((*CATEGORIES, "floor", *POINTERS))}

# Of the token between two documents, and of any other special one that begins a text.
BEGINNING = tuple({"leaf": LEAF["special"], "kind": KIND["module"]}.get(name, 0) for name in COLUMN)
