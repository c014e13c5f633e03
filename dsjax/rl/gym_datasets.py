"""reasoning-gym's generators by name and level, and its scorers, kept from running what an answer says.

Imported by the families (``dsjax.rl.exercises.gym``) and in the process that judges (``dsjax.rl.answer_judge``), where
nothing of this library but files without further imports is visible.
"""

from __future__ import annotations

import ast
import functools
import re
import warnings
from typing import Any

SIZE = 2**31 - 1  # numbers of a generator that makes each entry by itself
# Those that make something for each number at once, or end.
SIZES = {"acre": 8192, "gsm_symbolic": 2**16, "list_functions": 2**16, "word_ladder": 20_000}
_ORDER = "its questions depend on the order of Python's sets, which is another one in each process"
REFUSED = {
    "codeio": "it runs programs from a file to make its questions, and not every time the same way",
    "composite": "it is a mixture of the others",
    "isomorphic_strings": _ORDER,
    "polynomial_multiplication": _ORDER,
    "ransom_note": _ORDER,
}
# Of several right answers theirs depends on that order: it is not shown.
UNORDERED = ("knight_swap", "word_ladder")
# Higher levels take seconds or minutes for one question.
MOST_LEVELS = {"game_of_life": 3, "jugs": 2, "zebra_puzzles": 4}
PLAIN = ("knight_swap",)  # no level of its curriculum passes its own checks: level 1 is how it is without
# Their scorers hand an answer to eval(): one of Python's expressions has to be a literal.
EVALUATES = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
# Their scorers hand an answer to sympy's parser, which uses eval(): nothing but arithmetic with these names.
PARSES = ("intermediate_integration", "simple_integration")
_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d*)?|\.\d+)|([A-Za-z]+)|(\*\*|[-+*/^(),]))\s*")
_FUNCTIONS = {
    *("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh"),
    *("atanh", "exp", "log", "ln", "sqrt", "erf", "erfi", "pi"),
}


@functools.cache
def levels(name: str) -> tuple[int, ...]:
    """The levels of a generator that its own checks let pass: as many as its longest attribute has, or 1."""
    from reasoning_gym.factory import CURRICULA

    attributes = CURRICULA[name]().attributes if name in CURRICULA and name not in PLAIN else {}
    most = max((len(attribute.levels) for attribute in attributes.values()), default=1)
    most = min(most, MOST_LEVELS.get(name, most))
    return tuple(level for level in range(1, most + 1) if _passes(config(name, level)))


def config(name: str, level: int) -> Any:
    """The configuration of a level: each attribute at its level of that number, or its last one."""
    from reasoning_gym.factory import CURRICULA, DATASETS

    given = {"seed": 0, "size": SIZES.get(name, SIZE)}
    if name not in CURRICULA or name in PLAIN:
        return DATASETS[name][1](**given)
    curriculum = CURRICULA[name]()
    curriculum.set_global_level(level - 1)
    return curriculum.generate_configuration(given)


def _passes(found: Any) -> bool:
    try:
        if hasattr(found, "validate"):
            found.validate()
    except (AssertionError, ValueError):
        return False
    return True


@functools.lru_cache(maxsize=128)
def dataset(name: str, level: int) -> Any:
    """The generator of a level, which also judges."""
    from reasoning_gym.factory import DATASETS

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # a file that a package leaves open
        return DATASETS[name][0](config(name, level))


def score(name: str, level: int, answer: str, entry: dict[str, Any]) -> float:
    """What reasoning-gym gives for an answer, from 0 to 1. Raises whatever its scorer raises."""
    if not may_be_judged(name, answer):
        return 0.0
    return float(dataset(name, level).score_answer(answer, entry))


def may_be_judged(name: str, answer: str) -> bool:
    """Whether a scorer that evaluates answers may see this one: there is nothing in it that could be run.

    A number that is none (NaN) is refused, too: complex_arithmetic would find it equal to all.
    """
    if name == "complex_arithmetic" and "nan" in answer.lower():
        return False
    if name in EVALUATES:
        try:
            tree = ast.parse(answer.strip(), mode="eval")
        except SyntaxError:
            return True  # eval() will say so, too
        if isinstance(tree.body, ast.Name):
            return True
        try:
            ast.literal_eval(tree)
        except ValueError:
            return False
    if name in PARSES:
        at = 0
        while at < len(answer):
            token = _TOKEN.match(answer, at)
            if token is None or (token[2] and len(token[2]) > 1 and token[2] not in _FUNCTIONS):
                return False
            at = token.end()
    return True
