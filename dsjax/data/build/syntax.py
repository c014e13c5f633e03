"""Python's own parser, asked once for each text and without its warnings; and lines as it counts them."""

from __future__ import annotations

import ast
import functools
import io
import warnings


@functools.lru_cache(maxsize=2)
def parsed(text: str) -> ast.Module | str:
    """The tree of a program, not to be changed; or what this Python says against it, never empty."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes and the like
        try:
            return ast.parse(text)
        except SyntaxError as error:
            return f"line {error.lineno}: {error.msg}"
        except (ValueError, RecursionError, MemoryError) as error:
            return str(error) or type(error).__name__


def lines_of(text: str) -> list[str]:
    """The lines of a program, with their ends, as the parser counts them: a form feed, for one, ends none."""
    return list(io.StringIO(text, newline=""))
