"""A push-down machine over words, signs, brackets and lines: which blocks and brackets are open, which names are bound.

Errors are taken as they come. A bracket that closes nothing is passed over; one that closes another kind closes what
stands in it; what was opened and never closed ends at a word that can stand in no bracket; a line that is indented like
none before belongs to the block around. So the text behind an error is read as well as it can be without looking ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsjax.data.structure.language import Binds, Language
from dsjax.data.structure.lexer import Act, Mode, Place
from dsjax.data.structure.nodes import INLINE, WAITING, Node
from dsjax.data.structure.vocabulary import sign_leaf
from dsjax.nn.fields import DEPTHS, KIND, LEAF, LEAVES

HIGHEST = 2 * DEPTHS  # more than any level
NAME, DOT = LEAF["name"], LEAF["."]
_NUMBER, _STRING_END, _LAMBDA = LEAF["number"], LEAF["string_end"], LEAF["lambda"]
_OPERANDS = frozenset(LEAF[name] for name in ("name", ")", "]", "}", "string_end"))
_BEFORE_PARAMETERS = frozenset(LEAF[name] for name in ("(", ",", "*", "**"))
_VALUES = frozenset(("assignment", "return", "directive"))  # statements in which a brace opens no block
_IMPORTS = frozenset(("import", "from"))
_OF_STRINGS = frozenset(("field", "format"))
_ROUTINES = frozenset(("def", "async_def"))
# Words that are keywords only at the beginning of a statement: what, directly behind one, shows that it is a name.
_SHOWS_A_NAME = {
    "match": frozenset((".", "=", ",", ":", "augmented", "compare", "operator")),
    "type": frozenset(LEAVES),
}


_LONGEST = 256  # bytes of a name that are told apart
_REACH = 100  # brackets, in which one that is closed is looked for


def width(blanks: bytes, column: int = 0) -> int:
    """The column behind some white space, as Python counts them."""
    for blank in blanks:
        column = column + 1 if blank == 32 else 0 if blank == 12 else column // 8 * 8 + 8
    return column


def level(depth: int, in_brackets: bool = False) -> int:
    """How deep something stands, brackets counted once: what of a statement is in brackets ends with the statement."""
    return 2 * min(depth, DEPTHS - 1) + in_brackets


class Syntax:
    """The machine. Its methods are told what a lexer told (:class:`dsjax.data.structure.lexer.Act`).

    Attributes:
        number: of the token at hand.
        stack: open nodes, the outermost block first.
        statement: kind of the one at hand; ``none``: there is none.
        place: words and signs since it began.
        leaf: what came last.
        floor: the lowest level at which something ended, for whoever reads and resets it.
        dirty: something that belongs to the context changed, for whoever reads and resets it.
        goes_on: where the lexer goes on, if that is elsewhere than it says.
        unmatched: brackets that closed nothing.
        word: the one at hand, as far as it is told apart; column: of the line, up to its first word or sign.
    """

    def __init__(self, language: Language):
        self.language, self.number = language, 0
        self.begin()

    def begin(self) -> None:
        """A text begins."""
        self.stack = [Node("module", -1, column=0)]
        self.scopes = [node.names for node in self.stack if node.names is not None]
        self.statement, self.place, self.leaf = "none", 0, LEAF["newline"]
        self.floor, self.dirty, self.goes_on, self.unmatched = HIGHEST, True, None, 0
        self.word, self.column = b"", 0
        self._statement_at = self._word_at = self.number
        self._is_async, self._is_first, self._binds = False, False, Binds.NOT
        self._fields = 0  # open ones
        self._last: tuple[bytes, int] = (b"", -1)  # the last name, and where it stands
        self._targets: list[tuple[bytes, int]] = []  # names in front that an assignment would bind
        self._parameters: dict[bytes, int] | None = None  # of the header at hand

    goes_on: Place | None

    def copied_into(self, other: Any) -> None:
        """Gives another machine what this one would change."""
        other.stack = [node.copy() for node in self.stack]
        other.scopes = [node.names for node in other.stack if node.names is not None]
        other._targets = list(self._targets)
        other._parameters = None if self._parameters is None else dict(self._parameters)

    # ---------------------------------------------------------------- names

    def word_leaf(self, word: bytes) -> int:
        """The leaf of a word."""
        leaf = self.language.leaves.get(word)
        if leaf is not None:
            return leaf
        return _NUMBER if word[:1].isdigit() else NAME

    def bound(self, name: bytes) -> int:
        """The token in which a name was bound last, where it can be seen; -1: none."""
        for names in reversed(self.scopes):
            at = names.get(name)
            if at is not None:
                return at
        return -1

    def _bind(self, name: bytes, at: int) -> None:
        # An attribute belongs to an object, and of which is not known: to all.
        self.scopes[0 if name[:1] == b"." else -1][name] = at

    def _bind_targets(self) -> None:
        for name, at in self._targets:
            self._bind(name, at)
        self._targets.clear()
        if self.leaf == NAME:
            self._bind(*self._last)

    # ---------------------------------------------------------------- statements and blocks

    def _begins(self, kind: str, at: int) -> None:
        """A statement begins at a token."""
        top = self.stack[-1]
        if top.column == WAITING:
            if top.kind == "match":  # whose block can not be in its line: so it was `match[i]: int = 3`
                self._pop()
                self.statement, self.place = "assignment", 3
                return
            if self.language.indentation:
                top.column = INLINE
        if kind not in self.language.clauses and top.previous != KIND["decorator"]:
            top.siblings += 1
        top.items = 0
        self.statement, self._statement_at, self.place, self.dirty = kind, at, 0, True

    def _ends(self) -> None:
        """The statement at hand ends, if there is one."""
        self._binds, self._parameters, self._is_async = Binds.NOT, None, False
        self._targets.clear()
        if self.statement != "none":
            top = self.stack[-1]
            top.previous, top.items = KIND[self.statement], 0
            self.statement, self.place, self.dirty, self.leaf = "none", 0, True, LEAF["newline"]
            self.floor = min(self.floor, level(top.depth))

    def _push(self, node: Node) -> None:
        self.stack.append(node.placed(self.stack, self.language.loops))
        if node.names is not None:
            self.scopes.append(node.names)
        self.dirty = True

    def _pop(self) -> Node:
        node = self.stack.pop()
        if node.names is not None:
            self.scopes.pop()
        if node.column is not None:
            self.floor = min(self.floor, level(self.stack[-1].depth))
        self._fields -= node.kind == "field"
        self.dirty = True
        return node

    def _header_ends(self) -> None:
        """A block begins, with the statement at hand as its header."""
        kind, parameters = self.statement, self._parameters
        self.stack[-1].previous = KIND[kind]
        self._push(Node(kind, self._statement_at, column=WAITING))
        if kind in _ROUTINES:
            self.scopes[-1].update(parameters or {})
        self.statement, self.place, self._parameters, self._is_async, self._binds = "none", 0, None, False, Binds.NOT

    def _dedent(self, column: int) -> None:
        """The first statement of a line begins at a column: what is indented further ends."""
        stack = self.stack
        while stack[-1].column == WAITING:
            if column > max(stack[-2].column or 0, 0):
                stack[-1].column = column
                return
            self._pop()
        while len(stack) > 1 and (stack[-1].column or 0) > column:
            self._pop()

    def _expect_statement(self, kind: str = "expression") -> None:
        """Where none is at hand, what comes now begins one."""
        if self.statement == "none" and self.stack[-1].column is not None:
            self._begins(kind, self.number)

    # ---------------------------------------------------------------- words

    def on_piece(self, text: bytes) -> None:
        if not self.word:
            self._word_at = self.number
        self.word = (self.word + text)[:_LONGEST]

    def on_prefix(self, _: None) -> None:
        self.word = b""

    def on_word(self, _: None) -> None:
        word, at, self.word = self.word, self._word_at, b""
        leaf = self.word_leaf(word)
        if self.stack[-1].column is None and self._is_first and word in self.language.never_in_brackets:
            self._recover()
        self._is_first = False
        before = self.leaf if self.place else -1
        if self.stack[-1].column is not None and (self.statement == "none" or (self._is_async and self.place == 1)):
            self._first_word(word, at)
        elif self.place == 1 and self.statement == "type" and leaf != NAME:
            self.statement, self.dirty = "expression", True
        self.place += 1
        if leaf == NAME:
            self._name(word, at, before)
        elif word in self.language.binds:
            self._binds = self.language.binds[word]
        elif leaf == _LAMBDA:
            self._push(Node("lambda", self.number))
        self.leaf = leaf

    def _first_word(self, word: bytes, at: int) -> None:
        kind = self.language.statements.get(word, "expression")
        if kind == "case" and self.language.indentation and self.stack[-1].kind != "match":
            kind = "expression"
        if self._is_async:
            self.statement = "async_def" if kind == "def" else kind
            self._is_async, self.dirty = False, True
        elif word == b"async" and self.language.indentation:
            self._begins("expression", at)
            self._is_async = True
        else:
            self._begins(kind, at)

    def _name(self, word: bytes, at: int, before: int) -> None:
        """A name: whether it is bound here, or may turn out to be."""
        if before == DOT:
            self._last = (b"." + word, at)
            return
        self._last = (word, at)
        if self._binds is not Binds.NOT:
            self._bind(word, at)
            if self._binds is Binds.NEXT:
                self._binds = Binds.NOT
        elif self.stack[-1].kind == "parameters" and before in _BEFORE_PARAMETERS and self._parameters is not None:
            self._parameters[word] = at

    def _recover(self) -> None:
        """Brackets that nobody closed end here, and the statement that they stand in."""
        in_string = False
        while self.stack[-1].column is None:
            in_string |= self._pop().kind == "format"
        self._ends()
        while self.stack[-1].column == INLINE:
            self._pop()
        self._dedent(self.column)
        if in_string:
            self.goes_on = Place(Mode.CODE)

    # ---------------------------------------------------------------- signs

    def on_sign(self, sign: bytes) -> None:
        leaf_name, top = sign_leaf(self.language, sign), self.stack[-1]
        if sign == b";" and top.column is not None:
            self._ends()
        elif sign == b":" and self._colon():
            pass
        else:
            if top.column is not None:
                if self.statement == "none":
                    self._begins("decorator" if sign == b"@" else "expression", self.number)
                elif self.place == 1 and leaf_name in _SHOWS_A_NAME.get(self.statement, ()):
                    self.statement, self.dirty = "expression", True
                if sign == b"=" or leaf_name == "augmented":
                    self._assigned()
            if sign == b",":
                self._comma()
            elif sign == b":=" and self.leaf == NAME:
                self._bind(*self._last)
            self.place += 1
        self.leaf, self._is_first = LEAF[leaf_name], False

    def _assigned(self) -> None:
        if self.statement == "expression":
            self.statement, self.dirty = "assignment", True
        if self.statement in ("assignment", "type"):
            self._bind_targets()

    def _comma(self) -> None:
        top = self.stack[-1]
        top.items, self.dirty = top.items + 1, True
        if self.statement in _IMPORTS:
            self._binds = Binds.NEXT
        elif self.statement == "expression" and top.column is not None and self.leaf == NAME:
            self._targets.append(self._last)

    def _colon(self) -> bool:
        """Whether a colon was all that it takes to end a header or a label; else it is a sign like any other."""
        top, language = self.stack[-1], self.language
        if top.kind == "lambda":
            self._pop()
            return False
        if top.column is None:
            return False
        if not language.indentation:
            ends = self.statement in language.labels and (self.statement == "case" or self.place == 1)
            if ends:
                self._ends()
            return ends
        if self.statement in language.headers and (self.statement != "match" or self.place > 1):
            self._header_ends()
            return True
        if self.statement == "expression" and self.leaf == NAME:  # an annotation
            self.statement, self.dirty = "assignment", True
            self._bind(*self._last)
        return False

    # ---------------------------------------------------------------- brackets

    def on_open(self, opener: bytes) -> None:
        if opener == b"{" and not self.language.indentation and self._opens_block():
            self._header_ends_at_brace()
        else:
            self._expect_statement()
            if self.statement == "type" and self.place == 1:  # it was called
                self.statement = "expression"
            self._push(Node.bracket(self._bracket_kind(opener), self.number, opener))
            self.place += 1
        self.leaf, self._is_first = LEAF[opener.decode()], False

    def _bracket_kind(self, opener: bytes) -> str:
        if opener == b"{":
            return "braces"
        operand = self.place > 0 and self.leaf in _OPERANDS
        if opener == b"[":
            return "subscript" if operand else "list"
        if self.stack[-1].column is not None:
            if self.statement in _ROUTINES and self._parameters is None:
                self._parameters = {}
                return "parameters"
            if self.statement == "class" and operand:
                return "bases"
        return "call" if operand else "parens"

    def on_close(self, closer: bytes) -> None:
        self._is_first = False
        if closer == b"}" and not self.language.indentation and self._closes_block():
            self.leaf = LEAF["}"]
            return
        self._expect_statement()
        stack, i = self.stack, len(self.stack) - 1
        last = max(i - _REACH, 0)
        while i > last and stack[i].column is None and stack[i].closer != closer and stack[i].kind not in _OF_STRINGS:
            i -= 1
        if stack[i].column is None and stack[i].closer == closer:
            while len(stack) > i:
                node = self._pop()
            if node.back is not None:
                self.goes_on = node.back
            elif self._fields:
                self.goes_on = Place(Mode.CODE, level=1 if stack[-1].kind == "field" else 2)
        else:
            self.unmatched += 1
        self.place += 1
        self.leaf = LEAF[closer.decode()]

    # ---------------------------------------------------------------- braces around blocks

    def _opens_block(self) -> bool:
        return self.stack[-1].column is not None and self.statement not in _VALUES

    def _header_ends_at_brace(self) -> None:
        if self.statement == "expression":
            self.statement = "def" if self.leaf == LEAF[")"] else "block"
        elif self.statement not in self.language.headers:
            self._expect_statement("block")
            self.statement = "block"
        self._header_ends()

    def _closes_block(self) -> bool:
        """Whether a block ends: brackets in it that nobody closed end, too."""
        stack = self.stack
        innermost = stack[-1]
        if innermost.column is None and any(node.closer == b"}" for node in stack[innermost.block + 1 :]):
            return False
        if innermost.block == 0:
            return False
        while stack[-1].column is None:
            self._pop()
        self._ends()
        self._pop()
        return True

    # ---------------------------------------------------------------- strings

    def on_string(self, _: None) -> None:
        self._expect_statement("string")
        self.place, self._is_first = self.place + 1, False

    def on_string_end(self, _: None) -> None:
        self.leaf = _STRING_END

    def on_format(self, _: None) -> None:
        self.on_string(None)
        self._push(Node("format", self.number))

    def on_format_end(self, _: None) -> None:
        while self.stack[-1].column is None and self._pop().kind != "format":
            pass
        self.leaf = _STRING_END

    def on_field(self, back: Place) -> None:
        node = Node.bracket("field", self.number, b"{")
        node.back = back
        self._push(node)
        self._fields += 1
        self.leaf = LEAF["{"]

    def on_no_field(self, _: None) -> None:
        self.goes_on = self._pop().back

    def on_spec(self, _: None) -> None:
        if self.stack[-1].kind == "lambda":
            self._pop()
        back = self.stack[-1].back
        if back is not None:
            self.goes_on = back._replace(mode=Mode.SPEC)
        self.leaf = LEAF[":"]

    # ---------------------------------------------------------------- lines

    def on_newline(self, _: None) -> None:
        self.column = 0
        if self.language.indentation:
            while self.stack[-1].kind == "lambda" and self.stack[-1].brackets == 1:
                self._pop()
            if self.stack[-1].column is not None:
                self._ends()
            while self.stack[-1].column == INLINE:
                self._pop()
        elif self.statement == "directive":
            while self.stack[-1].column is None:
                self._pop()
            self._ends()

    def on_blanks(self, text: bytes) -> None:
        self.column = width(text, self.column)

    def on_line(self, _: None) -> None:
        self._is_first = True
        if self.language.indentation and self.stack[-1].column is not None:
            self._dedent(self.column)

    def on_directive(self, _: None) -> None:
        if self.stack[-1].column is not None:
            self._ends()
            self._begins("directive", self.number)


HANDLERS: dict[Act, Callable[..., None]] = {
    Act.PIECE: Syntax.on_piece,
    Act.WORD_END: Syntax.on_word,
    Act.WORD_IS_PREFIX: Syntax.on_prefix,
    Act.SIGN: Syntax.on_sign,
    Act.OPEN: Syntax.on_open,
    Act.CLOSE: Syntax.on_close,
    Act.STRING: Syntax.on_string,
    Act.STRING_END: Syntax.on_string_end,
    Act.FORMAT: Syntax.on_format,
    Act.FORMAT_END: Syntax.on_format_end,
    Act.FIELD: Syntax.on_field,
    Act.NO_FIELD: Syntax.on_no_field,
    Act.SPEC: Syntax.on_spec,
    Act.NEWLINE: Syntax.on_newline,
    Act.BLANKS: Syntax.on_blanks,
    Act.LINE_BEGIN: Syntax.on_line,
    Act.DIRECTIVE: Syntax.on_directive,
}
