"""Python that ``ast.parse`` refuses, and Python that it takes and a simpler grammar would refuse: a literal a line."""

from __future__ import annotations

import ast
import pathlib


def _cases(name: str) -> tuple[str, ...]:
    lines = (pathlib.Path(__file__).parent / name).read_text(encoding="utf-8").splitlines()
    return tuple(ast.literal_eval(line) for line in lines)


REFUSED = (*_cases("grammar_refused.txt"), "(" * 300 + ")" * 300)
TAKEN = _cases("grammar_taken.txt")
