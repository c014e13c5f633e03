"""``dsjax data build SRC DST`` and ``dsjax data tasks DST``: which of them, with which words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from dsjax.config import UserError

_PLACES = {"build": ("SRC", "DST"), "tasks": ("DST",)}


def run(what: Literal["build", "tasks"], words: Sequence[str], *, workers: int = 1, quiet: bool = False) -> int:
    """Runs one of the commands on data; returns its exit code.

    Args:
        what: which.
        words: its places, and behind them KEY=VALUE.
        workers: processes, of `build`.
        quiet: print nothing but the report.

    Raises:
        UserError: a place is missing, or what the command says is wrong.
    """
    names = _PLACES[what]
    places, overrides = list(words[: len(names)]), list(words[len(names) :])
    if len(places) < len(names):
        missing = " and ".join(names[len(places) :])
        raise UserError(f"dsjax data {what} needs {missing}: dsjax data {what} {' '.join(names)} [KEY=VALUE ...]")
    if what == "build":
        from dsjax.data.build.command import run as build

        return build(places[0], places[1], overrides, workers=workers, quiet=quiet)
    if workers != 1:
        raise UserError(f"--workers is {workers}; it goes with dsjax data build")
    from dsjax.data.tasks.command import run as tasks

    return tasks(places[0], overrides, quiet=quiet)
