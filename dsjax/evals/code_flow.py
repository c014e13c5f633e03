"""Data flow of Python programs: from which variables each variable comes (after GraphCodeBERT, Guo et al. 2021).

An edge goes from a definition that may reach a use to that use ("from"), and from each variable in a value to the
variable that gets the value ("computed"). Branches and loops join what reaches them. Names that the program does not
define (builtins, globals of elsewhere) have no edges.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from dsjax.evals.code_trees import Node

Reaching = dict[str, frozenset[int]]  # variable -> places of the definitions that may be in force

_SCOPES = ("function_definition", "lambda", "class_definition")
_LOOPS = ("for_statement", "while_statement")
_COMPREHENSIONS = ("list_comprehension", "set_comprehension", "dictionary_comprehension", "generator_expression")
_BRANCHES = ("elif_clause", "else_clause", "except_clause", "case_clause", "finally_clause")


class Edge(NamedTuple):
    """What reaches where. Variables are names as they are written."""

    target: str
    relation: str
    source: str


def data_flow(root: Node) -> tuple[Counter[Edge], list[str]]:
    """The edges of a program, and its variables in the order in which they are first defined."""
    flow = _Flow()
    try:
        flow.statement(root, {})
    except RecursionError:  # nested too deeply to be compared
        return Counter(), []
    return Counter(flow.edges.values()), list(dict.fromkeys(flow.names))


class _Flow:
    """Walks a tree in the order in which it runs.

    edges: (place of the use, relation, place of the definition) -> edge; so a loop that is walked twice counts once.
    """

    def __init__(self) -> None:
        self.edges: dict[tuple[int, str, int], Edge] = {}
        self.names: list[str] = []
        self._once = False  # within a loop that is walked again

    def statement(self, node: Node, env: Reaching) -> Reaching:
        """What is in force behind a node."""
        kind = node.type
        if kind in _SCOPES:
            return self._scope(node, env)
        if kind in _LOOPS:
            return self._loop(node, env)
        if kind in ("if_statement", "try_statement", "match_statement"):
            return self._branches(node, env)
        if kind in _COMPREHENSIONS:
            self._comprehension(node, dict(env))
            return env
        if kind in ("assignment", "augmented_assignment", "named_expression"):
            return self._assignment(node, env)
        if kind in ("as_pattern", "with_item") and (alias := node.child_by_field_name("alias")):
            return self._bind(alias, node.named_children[:1], env)
        if kind in ("import_statement", "import_from_statement"):
            return self._imports(node, env)
        if kind == "identifier":
            self._use(node, env)
            return env
        if kind == "attribute":
            return self.statement(node.child_by_field_name("object") or node.named_children[0], env)
        if kind == "keyword_argument":
            value = node.child_by_field_name("value")
            return self.statement(value, env) if value is not None else env
        for child in node.named_children:
            env = self.statement(child, env)
        return env

    def _use(self, node: Node, env: Reaching) -> None:
        name = node.text.decode("utf-8", errors="replace")
        for place in env.get(name, ()):
            self.edges[node.start_byte, "from", place] = Edge(name, "from", name)

    def _define(self, node: Node, sources: list[Node], env: Reaching) -> Reaching:
        """A variable gets a value that is computed from what is named in ``sources``."""
        name = node.text.decode("utf-8", errors="replace")
        self.names.append(name)
        for source in sources:
            for used in _identifiers(source):
                other = used.text.decode("utf-8", errors="replace")
                if other in env:
                    self.edges[node.start_byte, "computed", used.start_byte] = Edge(name, "computed", other)
        return env | {name: frozenset((node.start_byte,))}

    def _bind(self, target: Node, sources: list[Node], env: Reaching) -> Reaching:
        """Sources are used, and what ``target`` names is defined by them."""
        for source in sources:
            env = self.statement(source, env)
        before = env
        for node, base in _targets(target):
            if base:  # x[i] = v and x.a = v change x: it stays, and v flows into it
                self.statement(node, before)
                env = self._define(base, [*sources, node], before | env)
            else:
                env = self._define(node, sources, before | env)
        return env

    def _assignment(self, node: Node, env: Reaching) -> Reaching:
        left = node.child_by_field_name("left") or node.child_by_field_name("name")
        right = node.child_by_field_name("right") or node.child_by_field_name("value")
        if left is None:
            return env
        if right is None:  # an annotation alone
            return env
        sources = [right]
        if node.type == "augmented_assignment":
            env = self.statement(left, env)
            sources.append(left)
        lefts, rights = _parts(left), _parts(right)
        if len(lefts) == len(rights) > 1 and node.type == "assignment":  # a, b = x, y: each from its own
            env = self.statement(right, env)
            after = env
            for one, other in zip(lefts, rights, strict=True):
                bound = self._bind(one, [other], env)
                after = after | {name: at for name, at in bound.items() if env.get(name) != at}
            return after
        return self._bind(left, sources, env)

    def _scope(self, node: Node, env: Reaching) -> Reaching:
        name = node.child_by_field_name("name")
        inner = dict(env)
        parameters = node.child_by_field_name("parameters")
        for parameter in parameters.named_children if parameters is not None else ():
            default = parameter.child_by_field_name("value")
            if default is not None:
                self.statement(default, env)
            first = next(iter(_identifiers(parameter.child_by_field_name("name") or parameter)), None)
            if first is not None:
                inner = self._define(first, [default] if default is not None else [], inner)
        if name is not None:
            env = self._define(name, [], env)
            inner = {**env, **inner} if node.type == "function_definition" else inner
        body = node.child_by_field_name("body")
        if body is not None:
            self.statement(body, inner)
        return env

    def _loop(self, node: Node, env: Reaching) -> Reaching:
        """Twice through the body: what it defines may reach its beginning.

        The first walk tells what is in force behind it, and for that loops within are walked once: a second walk adds
        edges, which the second walk here finds as well. So time grows with depth, and does not double with it.
        """
        for once in (True,) if self._once else (True, False):
            self._once, inside = once, env
            left, right = node.child_by_field_name("left"), node.child_by_field_name("right")
            if left is not None and right is not None:
                inside = self._bind(left, [right], inside)
            condition, body = node.child_by_field_name("condition"), node.child_by_field_name("body")
            for part in (condition, body):
                inside = self.statement(part, inside) if part is not None else inside
            env = _joined(env, inside)
        alternative = node.child_by_field_name("alternative")
        return self.statement(alternative, env) if alternative is not None else env

    def _branches(self, node: Node, env: Reaching) -> Reaching:
        """What runs always, then each branch from there; behind it all that any of them leaves."""
        ends: list[Reaching] = []
        is_exhaustive = False
        for child in node.named_children:
            if child.type == "block" and node.type != "match_statement":
                after = self.statement(child, env)
                ends.append(after)
                env = _joined(env, after) if node.type == "try_statement" else env
            elif child.type == "block":
                for case in child.named_children:
                    ends.append(self._case(case, env))
            elif child.type in _BRANCHES:
                is_exhaustive |= child.type == "else_clause" and node.type == "if_statement"
                ends.append(self.statement(child, env))
            else:
                env = self.statement(child, env)
        if not is_exhaustive:
            ends.append(env)
        result = ends[0]
        for end in ends[1:]:
            result = _joined(result, end)
        return result

    def _case(self, node: Node, env: Reaching) -> Reaching:
        for child in node.named_children:
            if child.type == "case_pattern":
                for name in _identifiers(child):
                    env = self._define(name, [], env)
            else:
                env = self.statement(child, env)
        return env

    def _comprehension(self, node: Node, env: Reaching) -> None:
        body, *clauses = node.named_children
        for clause in clauses:
            left, right = clause.child_by_field_name("left"), clause.child_by_field_name("right")
            if left is not None and right is not None:
                env = self._bind(left, [right], env)
            else:
                env = self.statement(clause, env)
        self.statement(body, env)

    def _imports(self, node: Node, env: Reaching) -> Reaching:
        module = node.child_by_field_name("module_name")
        for child in node.named_children:
            if child == module:
                continue
            names = list(_identifiers(child.child_by_field_name("alias") or child))
            if names:
                env = self._define(names[0], [], env)
        return env


def _joined(a: Reaching, b: Reaching) -> Reaching:
    return {name: a.get(name, frozenset()) | b.get(name, frozenset()) for name in {**a, **b}}


def _identifiers(node: Node) -> list[Node]:
    """The variables named in an expression: no attributes, no names of keyword arguments."""
    found: list[Node] = []
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node.type == "identifier":
            found.append(node)
        elif node.type == "attribute":
            waiting += node.named_children[:1]
        elif node.type == "keyword_argument":
            waiting += node.named_children[1:]
        else:
            waiting += reversed(node.named_children)
    return found


def _parts(node: Node) -> list[Node]:
    return node.named_children if node.type in ("pattern_list", "expression_list", "tuple_pattern", "tuple") else [node]


def _targets(node: Node) -> list[tuple[Node, Node | None]]:
    """What an assignment defines: (name, None), or (x[i] or x.a, x)."""
    if node.type == "identifier":
        return [(node, None)]
    if node.type in ("subscript", "attribute"):
        base = next(iter(_identifiers(node)), None)
        return [(node, base)] if base is not None else []
    return [target for child in node.named_children for target in _targets(child)]
